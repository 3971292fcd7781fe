"""Workloads: the same requests at every load and seed, and every fault named by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from sglang_slo.twin.devices.profiles import load_profile, names
from sglang_slo.twin.sim.tokens import BLOCK_TOKENS, VOCAB, prompt
from sglang_slo.twin.workloads import workload as w
from sglang_slo.twin.workloads.workload import WorkloadError, load_workload

GENERATED = [n for n in w.names() if n.endswith("-generated")]


def write(folder: Path, **changes: object) -> str:
    spec: dict[str, object] = {
        "profile": "h200-llama3-8b",
        "seed": 3,
        "max_requests": 50,
        "classes": {"chat": {"ttft_ms": 1000, "tbt_ms": 50}},
        "streams": [{"class": "chat", "trace": "trace.csv"}],
    }
    spec.update(changes)
    path = folder / "traffic.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in spec.items() if v is not None}))
    return str(path)


def trace(folder: Path, *rows: str, name: str = "trace.csv") -> None:
    (folder / name).write_text("\n".join(["arrival_s,input_tokens,output_tokens", *rows]) + "\n")


@pytest.mark.parametrize("name", GENERATED)
def test_generated_workloads_need_no_trace_and_repeat(name: str) -> None:
    one, two, other = load_workload(name), load_workload(name), load_workload(name, seed=99)
    assert (one.arrival_s == two.arrival_s).all() and (one.output_tokens == two.output_tokens).all()
    assert not np.array_equal(one.arrival_s, other.arrival_s)
    assert (np.diff(one.arrival_s) >= 0).all() and one.arrival_s[0] == 0
    assert (one.input_tokens >= 1).all() and (one.output_tokens >= 1).all()


def test_load_compresses_time_and_changes_nothing_else() -> None:
    slow, fast = load_workload("mix-generated"), load_workload("mix-generated", load=2.0)
    assert np.allclose(slow.arrival_s, fast.arrival_s * 2)
    assert (slow.input_tokens == fast.input_tokens).all()
    assert (slow.class_id == fast.class_id).all()


def test_a_trace_is_read_as_it_is(tmp_path: Path) -> None:
    trace(tmp_path, "0.5,100,5", "1.5,3000,1", "9,20,7")
    got = load_workload(write(tmp_path))
    assert got.arrival_s.tolist() == [0.0, 1.0, 8.5]
    assert got.input_tokens.tolist() == [100, 3000, 20]
    assert got.output_tokens.tolist() == [5, 1, 7]


def test_the_first_trace_that_ends_ends_the_workload(tmp_path: Path) -> None:
    trace(tmp_path, "0,1,1", "3,1,1")
    trace(tmp_path, *(f"{t},1,1" for t in range(10)), name="longer.csv")
    streams = [{"class": "chat", "trace": n} for n in ("trace.csv", "longer.csv")]
    assert load_workload(write(tmp_path, streams=streams)).arrival_s.max() == 3.0


def test_scaling_clipping_and_dropping_of_prompts(tmp_path: Path) -> None:
    trace(tmp_path, "0,100,1", "1,200,1", "2,300,1")
    stream = {"class": "chat", "trace": "trace.csv", "input_scale": 4, "clip_input_tokens": 1000}
    assert load_workload(write(tmp_path, streams=[stream])).input_tokens.tolist() == [400, 800, 1000]
    stream = {"class": "chat", "trace": "trace.csv", "drop_input_over": 250}
    assert load_workload(write(tmp_path, streams=[stream])).input_tokens.tolist() == [100, 200]


def test_prefix_blocks_become_shared_tokens(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 0, "input_length": 1200, "output_length": 5, "hash_ids": [1, 7, 8]},
        {"timestamp": 3000, "input_length": 1000, "output_length": 5, "hash_ids": [1, 2]},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    got = load_workload(write(tmp_path, streams=[{"class": "chat", "trace": "m.jsonl"}]))
    by_blocks = {blocks[1:]: prompt(got, i) for i, blocks in enumerate(got.blocks) if blocks}
    assert by_blocks[(1, 2)][:BLOCK_TOKENS] == by_blocks[(1, 7, 8)][:BLOCK_TOKENS]
    assert by_blocks[(1, 2)][BLOCK_TOKENS] != by_blocks[(1, 7, 8)][BLOCK_TOKENS]
    assert [len(prompt(got, i)) for i in range(3)] == got.input_tokens.tolist()


def test_plain_prompts_share_no_first_token() -> None:
    got = load_workload("mix-generated")
    firsts = [prompt(got, i)[0] for i in range(len(got))]
    assert len(set(firsts)) == len(firsts)
    assert all(0 < t < VOCAB for t in prompt(got, 0))


def test_declared_length_is_the_true_one_or_a_ceiling(tmp_path: Path) -> None:
    trace(tmp_path, "0,10,5", "1,10,9000")
    assert [load_workload(write(tmp_path)).declared(i) for i in (0, 1)] == [5, 9000]
    capped = load_workload(write(tmp_path, declared_max_new_tokens=8192))
    assert [capped.declared(i) for i in (0, 1)] == [8192, 9000]


BAD_YAML = [
    ({"profile": "h100"}, "profile"),
    (
        {
            "max_requests": None,
            "streams": [{"class": "chat", "lengths": "trace.csv", "arrivals": {"poisson_rps": 1}}],
        },
        "horizon_s or max_requests",
    ),
    ({"max_requests": "many"}, "max_requests"),
    ({"classes": {"chat": {"ttft": 5}}}, "classes.chat.ttft"),
    ({"colour": 1}, "colour"),
    ({"predictor": "crystal ball"}, "predictor"),
    ({"streams": []}, "streams"),
    ({"streams": [{"class": "chat", "trace": "no.csv"}]}, "streams[0].trace"),
    ({"streams": [{"class": "code", "trace": "trace.csv"}]}, "streams[0].class"),
    ({"streams": [{"class": "chat", "trace": "trace.csv", "scale": 2}]}, "streams[0].scale"),
    ({"streams": [{"class": "chat", "arrivals": {"poisson_rps": 1}}]}, "streams[0].lengths"),
    (
        {"streams": [{"class": "chat", "lengths": {"input": {"fixed": 0}}, "arrivals": {"poisson_rps": 1}}]},
        "input",
    ),
    ({"streams": [{"class": "chat", "lengths": "trace.csv", "arrivals": {"rps": 1}}]}, "streams[0].arrivals"),
    ({"declared_max_new_tokens": False}, "declared_max_new_tokens"),
]


@pytest.mark.parametrize(("change", "field"), BAD_YAML)
def test_a_bad_workload_names_file_and_field(tmp_path: Path, change: dict[str, object], field: str) -> None:
    trace(tmp_path, "0,10,5")
    with pytest.raises(WorkloadError) as error:
        load_workload(write(tmp_path, **change))
    assert field in str(error.value)
    assert "traffic.yaml" in str(error.value) or field == "profile"


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ("x,10,5", "arrival_s"),
        ("3,0,5", "input_tokens"),
        ("3,10,nan", "output_tokens"),
        ("3,10", "output_tokens"),
    ],
)
def test_a_bad_row_names_file_line_and_field(tmp_path: Path, row: str, field: str) -> None:
    trace(tmp_path, "0,10,5", row)
    with pytest.raises(WorkloadError, match=rf"trace\.csv:3: {field}"):
        load_workload(write(tmp_path))


def test_rows_out_of_order_and_missing_columns_are_named(tmp_path: Path) -> None:
    trace(tmp_path, "5,10,5", "4,10,5")
    with pytest.raises(WorkloadError, match=r"trace\.csv:3: arrival_s"):
        load_workload(write(tmp_path))
    (tmp_path / "trace.csv").write_text("arrival_s,input_tokens\n1,2\n")
    with pytest.raises(WorkloadError, match=r"trace\.csv:1: output_tokens"):
        load_workload(write(tmp_path))


@pytest.mark.parametrize("load", [0.0, -1.0, float("nan"), float("inf")])
def test_a_load_that_is_none_is_refused(load: float) -> None:
    with pytest.raises(WorkloadError, match="load"):
        load_workload("mix-generated", load=load)


def test_shipped_profiles_say_that_they_are_models() -> None:
    for name in names():
        profile = load_profile(name)
        assert profile.name == name and not profile.measured and profile.kv_capacity_tokens > 0


@pytest.mark.parametrize("loop", [{"clients": 0}, {"clients": 2, "start": "soon"}, {"users": 3}, 5])
def test_a_bad_loop_is_named(tmp_path: Path, loop: object) -> None:
    trace(tmp_path, "0,1,1")
    with pytest.raises(WorkloadError, match="loop"):
        load_workload(write(tmp_path, loop=loop))


def test_load_multiplies_the_clients_of_a_closed_loop(tmp_path: Path) -> None:
    trace(tmp_path, "0,1,1", "5,2,2")
    got = load_workload(write(tmp_path, loop={"clients": 4, "start": "staggered"}), load=2.0)
    assert (got.clients, got.staggered, got.arrival_s.tolist()) == (8, True, [0.0, 0.0])


def test_a_surge_multiplies_the_rate_while_it_lasts(tmp_path: Path) -> None:
    arrivals = {"poisson_rps": 50, "surge": {"from_s": 20, "to_s": 40, "factor": 3}}
    lengths = {"input": {"fixed": 1}, "output": {"fixed": 1}}
    stream = {"class": "chat", "lengths": lengths, "arrivals": arrivals}
    got = load_workload(write(tmp_path, max_requests=None, horizon_s=60, streams=[stream]))
    before, during, after = np.histogram(got.arrival_s, [0, 20, 40, 60])[0] / 20
    assert 43 < before < 57 and 138 < during < 162 and 43 < after < 57
    arrivals["surge"] = {"from_s": 9, "to_s": 3, "factor": 1}
    with pytest.raises(WorkloadError, match="surge"):
        load_workload(write(tmp_path, streams=[stream]))
