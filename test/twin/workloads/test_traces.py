"""Traces of the field are read without writing code, told apart by their content, and their faults are named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from observed import make_record
from sglang_slo.core.slo import GapRule, Slo
from sglang_slo.observe import request_log
from sglang_slo.observe.judge import judge
from sglang_slo.twin import workloads
from sglang_slo.twin.workloads.streams import Stream, WorkloadError
from sglang_slo.twin.workloads.workload import load_workload

AIPERF = {
    "metadata": {"request_start_ns": 5_000_000_000, "conversation_id": "c1", "benchmark_phase": "profiling"},
    "metrics": {
        "input_sequence_length": {"value": 550, "unit": "tokens"},
        "output_sequence_length": {"value": 40, "unit": "tokens"},
    },
    "error": None,
}
LOG = {
    "arrival_s": 10.0,
    "prompt_tokens": 30,
    "output_tokens": 7,
    "class": "chat",
    "ttft_limit_s": 0.5,
    "tbt_limit_s": 0.05,
    "features": {"caller": "anna", "declared_max": 400},
}
FILES: dict[str, str] = {
    "csv": "arrival_s,input_tokens,output_tokens,class,caller\n1,10,5,chat,anna\n2,20,6,code,\n",
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
    "2023-11-16 18:15:50.9951690,396,109\n",
    "burstgpt": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,100,0,100,Conversation log\n60,GPT-4,12,9,21,API log\n",
    "mooncake": '{"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [1, 2]}\n'
    '{"timestamp": 3000, "input_length": 600, "output_length": 6, "hash_ids": [1, 3]}\n',
    "sharegpt": json.dumps(
        [
            {
                "id": "a",
                "conversations": [{"from": "human", "value": "x" * 40}, {"from": "gpt", "value": "y" * 80}],
            }
        ]
    ),
    "alpaca_eval": json.dumps({"instruction": "say it" * 4, "output_chars": {"a": 40, "b": 400}}) + "\n",
    "bench_serving": json.dumps({"request_rate": 2.0, "input_lens": [10, 20, 30], "output_lens": [1, 0, 3]})
    + "\n",
    "aiperf": json.dumps(AIPERF) + "\n" + json.dumps({**AIPERF, "error": {"code": 500}}) + "\n",
    "guidellm": json.dumps(
        {
            "benchmarks": [
                {
                    "requests": {
                        "successful": [
                            {"prompt_tokens": 12, "output_tokens": 3, "request_start_time": 100.5},
                            {"prompt_tokens": 14, "output_tokens": 4, "request_start_time": 101.0},
                        ]
                    }
                }
            ]
        },
        indent=1,
    ),
    "request_log": json.dumps(LOG) + "\n" + json.dumps({**LOG, "arrival_s": 9.0, "output_tokens": 0}) + "\n",
}


def read(folder: Path, form: str, text: str | None = None) -> Stream:
    path = folder / "trace"
    path.write_text(FILES[form] if text is None else text)
    return workloads.read(path, np.random.default_rng(0))


@pytest.mark.parametrize("form", workloads.FORMATS)
def test_a_format_is_told_by_its_content(tmp_path: Path, form: str) -> None:
    path = tmp_path / "trace"
    path.write_text(FILES[form])
    assert workloads.detect(path) == form


@pytest.mark.parametrize(
    ("form", "lengths", "arrivals"),
    [
        ("csv", [(10, 5), (20, 6)], [1, 2]),
        ("azure", [(374, 44), (396, 109)], [0, 4.314579]),
        ("burstgpt", [(472, 18), (12, 9)], [5, 60]),  # a failed request is no request
        ("mooncake", [(700, 5), (600, 6)], None),
        ("sharegpt", [(10, 20)], None),
        ("alpaca_eval", [(6, 10), (6, 100)], None),
        ("bench_serving", [(10, 1), (30, 3)], None),
        ("aiperf", [(550, 40)], [5]),
        ("guidellm", [(12, 3), (14, 4)], [100.5, 101.0]),
        ("request_log", [(30, 7)], [10]),
    ],
)
def test_lengths_and_arrivals_are_those_of_the_file(
    tmp_path: Path, form: str, lengths: list[tuple[int, int]], arrivals: list[float] | None
) -> None:
    stream = read(tmp_path, form)
    assert list(zip(stream.input_tokens.tolist(), stream.output_tokens.tolist(), strict=True)) == lengths
    assert stream.timed is (form not in ("sharegpt", "alpaca_eval"))
    if arrivals is not None:
        assert stream.arrival_s.tolist() == pytest.approx(arrivals)
    assert (np.diff(stream.arrival_s) >= 0).all()


def test_classes_callers_and_prompts_come_along(tmp_path: Path) -> None:
    csv = read(tmp_path, "csv")
    assert (csv.classes, csv.callers) == (["chat", "code"], ["anna", ""])
    alpaca = read(tmp_path, "alpaca_eval")
    assert alpaca.callers == ["a", "b"] and alpaca.texts == ["say it" * 4] * 2
    assert read(tmp_path, "request_log").declared == [400]
    assert csv.pick(np.array([1])).classes == ["code"]


@pytest.mark.parametrize(
    ("form", "text", "named"),
    [
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", ":2: TIMESTAMP"),
        ("burstgpt", "Timestamp,Request tokens,Response tokens\n1,x,2\n", ":2: Request tokens"),
        ("csv", "input_tokens\n3\n", ":1: output_tokens"),
        ("csv", "arrival_s,input_tokens,output_tokens\n1,2,3\n1,2,3.5\n", ":3: output_tokens"),
        ("aiperf", json.dumps({**AIPERF, "metrics": {}}), ":1: input_sequence_length"),
        ("request_log", json.dumps({**LOG, "tbt_limit_s": "soon"}), ":1: tbt_limit_s"),
        ("request_log", json.dumps({**LOG, "rule": "often"}), ":1: rule"),
        ("guidellm", json.dumps({"benchmarks": [{"requests": {"successful": [{}]}}]}), "prompt_tokens"),
        ("sharegpt", '[{"id": 1}]', r"\[0\].conversations"),
        ("bench_serving", json.dumps({"input_lens": [1], "output_lens": []}), "output_lens"),
        ("mooncake", '{"hash_ids": [1], "timestamp": 0, "input_length": 600, "output_length": 1}', "too few"),
        ("mooncake", '{"a": 1}\n', "known by its fields"),
    ],
)
def test_a_fault_is_named_by_file_line_and_field(tmp_path: Path, form: str, text: str, named: str) -> None:
    with pytest.raises(WorkloadError, match=f"trace.*{named}"):
        read(tmp_path, form, text)


def yaml_file(folder: Path, **stream: Any) -> str:
    path = folder / "own.yaml"
    path.write_text(json.dumps({"classes": {"chat": {"ttft_ms": 900}, "code": {}}, "streams": [stream]}))
    return str(path)


def test_the_end_of_a_trace_is_the_horizon_and_its_class_column_counts(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(FILES["csv"])
    got = load_workload(yaml_file(tmp_path, trace="t.csv"))
    assert len(got) == 2
    assert [got.class_names[c] for c in got.class_id] == ["chat", "code"]
    named = load_workload(yaml_file(tmp_path, **{"trace": "t.csv", "class": "code"}))
    assert [named.class_names[c] for c in named.class_id] == ["code", "code"]


def test_a_class_that_is_not_declared_and_lengths_without_times_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(FILES["csv"].replace("code", "mail"))
    with pytest.raises(WorkloadError, match="mail"):
        load_workload(yaml_file(tmp_path, trace="t.csv"))
    (tmp_path / "s.json").write_text(FILES["sharegpt"])
    with pytest.raises(WorkloadError, match="lengths"):
        load_workload(yaml_file(tmp_path, **{"trace": "s.json", "class": "chat"}))


def test_a_request_log_replays_by_itself_with_its_limits(tmp_path: Path) -> None:
    rows = [LOG, {**LOG, "arrival_s": 11.5, "ttft_limit_s": 2.0, "rule": "paced", "tbt_limit_s": None}]
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    got = load_workload(str(tmp_path / "log.jsonl"))
    assert got.arrival_s.tolist() == [0.0, 1.5]
    assert got.class_names == ["chat", "chat-2"]  # one name, two promises
    assert [got.limits[c].ttft_s for c in got.class_id] == [0.5, 2.0]
    assert got.limits[1].gap_rule is GapRule.PACE
    assert (got.declared(0), got.callers) == (400, ["anna", "anna"])


limits_s = st.sampled_from([math.inf, 0.05, 2.0])


@given(limits_s, limits_s, limits_s, limits_s, st.sampled_from(GapRule), st.integers(-1, 1))
def test_every_promise_that_a_server_logs_is_replayed(
    ttft_s: float, tbt_s: float, tpot_s: float, e2e_s: float, rule: GapRule, importance: int
) -> None:
    """As the server itself writes it, so that the two cannot come apart."""
    pause_s = 10 * tbt_s if rule is GapRule.P99 else math.inf
    slo = Slo(ttft_s, tbt_s, "chat", tpot_s, e2e_s, rule, pause_s, importance)
    record = make_record(0.1, (0.01,), slo)
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        log.write_text(json.dumps(request_log.row(record, judge(record), 0.0)) + "\n")
        assert load_workload(str(log)).limits == [slo]


def test_features_and_callers_are_drawn_and_repeat(tmp_path: Path) -> None:
    stream = {
        "class": "chat",
        "lengths": {"input": {"fixed": 50}, "output": {"uniform": [1, 400]}},
        "arrivals": {"poisson_rps": 5},
        "features": {"penalty": 0.3, "logprobs": 0.2},
        "callers": 4,
    }
    one, two = (load_workload(yaml_file(tmp_path, **stream), max_requests=400) for _ in range(2))
    assert one.features == two.features and one.features is not None and one.callers is not None
    assert 0.2 < one.features.count("penalty") / 400 < 0.4
    mean = {c: one.output_tokens[[x == c for x in one.callers]].mean() for c in sorted(set(one.callers))}
    assert list(mean.values()) == sorted(mean.values()) and len(mean) == 4
    with pytest.raises(WorkloadError, match="features"):
        load_workload(yaml_file(tmp_path, **{**stream, "features": {"magic": 1}}), max_requests=4)
