"""Whatever a request asks of SGLang, it gets what SGLang alone would have given: cut, parked, split, mixed, preempted."""

from __future__ import annotations

import dataclasses
import inspect
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from sglang.srt.managers.io_struct import AbortReq, GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams

import real_scheduler as real
from sglang_slo.config import SloConfig
from sglang_slo.core.latency import Coefficients, LatencyModel
from sglang_slo.core.slo import Slo
from sglang_slo.runtime.requests import batches, features, penalties
from sglang_slo.runtime.requests.registry import RequestRegistry

EOS = 1
TOKENIZER = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=EOS)
# feature -> (fields of the request, of its sampling)
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "frequency": ({}, {"frequency_penalty": 0.9}),
    "presence": ({}, {"presence_penalty": 1.5}),
    "repetition": ({}, {"repetition_penalty": 1.7}),
    "min_new": ({}, {"min_new_tokens": 20, "stop_token_ids": set(range(2, 300)), "ignore_eos": False}),
    "all penalties": (
        {},
        {"frequency_penalty": -0.4, "presence_penalty": 0.7, "repetition_penalty": 1.2, "min_new_tokens": 9},
    ),
    "bias": ({}, {"logit_bias": {"77": 3.0, "12": -2.0}}),
    "logprob": ({"return_logprob": True}, {}),
    "prompt logprob": ({"return_logprob": True, "logprob_start_len": 3, "top_logprobs_num": 2}, {}),
    "hidden": ({"return_hidden_states": True}, {}),
}
WAYS = ("swap", "keep", "recompute", "stock")
OVERLAP = {"overlap": [], "no overlap": ["--disable-overlap-schedule"]}
EXACT = ["--enable-return-hidden-states", "--dtype", "float32"]  # in bfloat16, other batches break other ties


def requests(length: int) -> list[Any]:
    """One request with each feature, none of them alone in its batch."""
    return [
        real.request(name, prompt, 24 + 2 * i, wants, **params)
        for i, ((name, (wants, params)), prompt) in enumerate(
            zip(FEATURES.items(), real.prompts(len(FEATURES), length), strict=True)
        )
    ]


class _OneByOne:
    """Each request is sent when the one before it has ended."""

    def __init__(self, sent: list[Any]) -> None:
        self._left = list(sent)

    def __call__(self, scheduler: Any, iteration: int) -> list[Any]:
        if self._left and scheduler.is_fully_idle():
            return [self._left.pop(0)]
        return []


_alone: dict[Any, real.Run] = {}


def alone(length: int, overlap: str, folder: Path) -> real.Run:
    """Stock, with nobody beside any request."""
    if (length, overlap) not in _alone:
        argv = ["--max-total-tokens", "20000", *EXACT, *OVERLAP[overlap]]
        _alone[length, overlap] = real.run(
            _OneByOne(requests(length)), len(FEATURES), argv, folder, False, TOKENIZER
        )
    return _alone[length, overlap]


def same(run: real.Run, expected: real.Run, missing: str = "") -> None:
    """Tokens are equal, log-probabilities and hidden states as many and as near as another batch leaves them."""
    assert run.tokens == {rid: tokens for rid, tokens in expected.tokens.items() if rid != missing}
    for rid, req in run.reqs.items():
        other = expected.reqs[rid]
        for name in ("input_token_logprobs_val", "output_token_logprobs_val", "input_token_logprobs_idx"):
            _near(getattr(req.logprob, name), getattr(other.logprob, name))
        assert [len(row) for row in req.hidden_states] == [len(row) for row in other.hidden_states], rid
        _near(_flat(req.hidden_states), _flat(other.hidden_states))


def _near(got: Any, want: Any) -> None:
    assert (got is None) == (want is None)
    if got is not None:
        assert [x is None for x in got] == [x is None for x in want]
        assert [x for x in got if x is not None] == pytest.approx(
            [x for x in want if x is not None], abs=1e-3
        )


def _flat(rows: Any) -> list[float]:
    return [x for row in rows for x in _flat(row)] if isinstance(rows, list) else [rows]


def nothing_is_left(run: real.Run) -> None:
    s = run.scheduler
    free = s.token_to_kv_pool_allocator.available_size() + s.tree_cache.evictable_size()
    assert free == s.max_total_num_tokens
    assert len(s.slo_registry.table) == 0 and s.slo_preempt.idle
    assert s.slo_observer.trouble.count == 0 and s.slo_observer.snapshot(0.0)["fallbacks"]["count"] == 0


LOGPROBS: tuple[dict[str, Any], ...] = (
    {},
    {"return_logprob": True},
    {"return_logprob": True, "token_ids_logprob": [20, 21]},
    {"return_logprob": True, "top_logprobs_num": 3},
    {"return_logprob": True, "token_ids_logprob": [30], "logprob_start_len": 2},
)


@pytest.mark.parametrize("overlap", OVERLAP)
def test_log_probabilities_of_every_kind_are_served_in_one_batch(overlap: str, folder: Path) -> None:
    """SGLang alone ends where one request of a batch names tokens and another does not."""

    def sent() -> list[Any]:
        asked = zip(LOGPROBS, real.prompts(len(LOGPROBS), 30), strict=True)
        return [real.request(f"r{i}", prompt, 8, wants) for i, (wants, prompt) in enumerate(asked)]

    argv = ["--max-total-tokens", "20000", *EXACT, *OVERLAP[overlap]]
    run = real.run(real.all_at_once(sent()), len(LOGPROBS), argv, folder)
    expected = real.run(_OneByOne(sent()), len(LOGPROBS), argv, folder, False)
    assert run.tokens == expected.tokens
    for rid, req in run.reqs.items():
        values = (r.logprob.output_token_ids_logprobs_val or [] for r in (req, expected.reqs[rid]))
        got, want = (_flat(v) for v in values)
        assert got == pytest.approx(want, abs=1e-3)
        assert len(got) == 8 * len(LOGPROBS[int(rid[1:])].get("token_ids_logprob", ()))


SMALL = [
    *("--max-total-tokens", "300", "--slo-kv", "stock", "--schedule-conservativeness", "0.05"),
    *("--slo-length", "none", "--slo-max-preemptions", "50", "--slo-host-kv-gb", "0.004"),
]


@pytest.mark.parametrize("overlap", OVERLAP)
@pytest.mark.parametrize("way", WAYS)
def test_a_preemption_changes_nothing_that_was_asked_for(way: str, overlap: str, folder: Path) -> None:
    argv = [*SMALL, "--slo-preempt", way, *EXACT, *OVERLAP[overlap]]
    run = real.run(real.all_at_once(requests(20)), len(FEATURES), argv, folder, True, TOKENIZER)
    assert run.counts[way] > 0
    preempted = {rid for rid, req in run.reqs.items() if req.retraction_count}
    assert preempted
    if way != "stock":  # whom SGLang retracts is its own choice
        assert preempted & {"frequency", "presence", "repetition", "all penalties", "hidden", "min_new"}
    same(run, alone(20, overlap, folder))
    nothing_is_left(run)


def _every_other(scheduler: Any) -> None:
    """From now on plans let only half of the running requests decode, by turns, and mix what they prefill with them."""
    plan = scheduler.slo_planner.plan

    def halves(view: Any) -> Any:
        found = plan(view)
        if len(view.decoding) > 1:
            half = np.arange(scheduler.forward_ct % 2, len(view.decoding), 2)
            found = dataclasses.replace(found, decode=half)
        return found

    scheduler.slo_planner.plan = halves
    scheduler.slo_planning._nothing_to_decide = lambda running: False


@pytest.mark.parametrize("overlap", OVERLAP)
@pytest.mark.parametrize("mix", ["always", "never"])
def test_sitting_out_cutting_and_mixing_change_nothing_that_was_asked_for(
    mix: str, overlap: str, folder: Path
) -> None:
    sent, parts = requests(60), []

    def script(scheduler: Any, iteration: int) -> list[Any]:
        if iteration == 1:
            _every_other(scheduler)
        parts.append(scheduler.slo_split is not None)
        return [sent.pop(0)] if sent and iteration % 3 == 1 else []

    argv = [
        "--max-total-tokens",
        "4000",
        "--chunked-prefill-size",
        "128",
        "--slo-mix",
        mix,
        "--slo-length",
        "none",
    ]
    run = real.run(script, len(FEATURES), [*argv, *EXACT, *OVERLAP[overlap]], folder, True, TOKENIZER)
    assert sum(parts) > 10
    same(run, alone(60, overlap, folder))
    nothing_is_left(run)


# -- the table knows SGLang


def _known() -> set[str]:
    return set().union(features.PLAIN, *(feature.names for feature in features.TABLE))


@pytest.mark.parametrize(
    "fields",
    [
        list(inspect.signature(Req.__init__).parameters)[1:],
        [f.name for f in msgspec.structs.fields(SamplingParams)],
        [f.name for f in msgspec.structs.fields(TokenizedGenerateReqInput)],
        [f.name for f in dataclasses.fields(GenerateReqInput)],
    ],
    ids=["Req", "SamplingParams", "TokenizedGenerateReqInput", "GenerateReqInput"],
)
def test_the_table_knows_each_field_of_a_request(fields: list[str]) -> None:
    assert set(fields) - _known() == set()


@pytest.mark.parametrize("kind", [ScheduleBatch, SamplingBatchInfo])
def test_batches_know_each_field_of_a_batch(kind: Any) -> None:
    assert {f.name for f in dataclasses.fields(kind)} - batches.DIVIDED - batches.NOT_DIVIDED == set()


def test_every_penalty_of_sglang_can_be_counted_anew() -> None:
    assert features.penalizers() == set(penalties.REBUILT)


def test_a_penalty_that_is_not_known_keeps_its_request_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    rebuilt = {k: v for k, v in penalties.REBUILT.items() if "Frequency" not in k.__name__}
    monkeypatch.setattr(features, "REBUILT", rebuilt)
    one, other = (_req(frequency_penalty=p) for p in (0.5, 0.0))
    assert features.of(other) == features.ALL
    permits = features.of(one)
    assert not (permits.leave or permits.swap or permits.split or permits.mix)
    registry = RequestRegistry(SloConfig())
    model = LatencyModel(Coefficients(6e-3, 1e-3, 27e-6, 1.3e-9, 4e-3, 33e-9))
    rows = [registry.open(req, Slo(), 0.0, model) for req in (one, other)]
    assert registry.table.splittable[rows].tolist() == [False, True]


def test_nobody_sits_out_beside_one_that_may_not_be_split_from_its_batch(folder: Path) -> None:
    seen: list[bool] = []

    def script(scheduler: Any, iteration: int) -> list[Any]:
        running = scheduler.running_batch
        if len(running.reqs) > 2 and not seen:
            table = scheduler.slo_ports.requests.table
            for splittable in (True, False):
                table.splittable[running.reqs[1].slo_row] = splittable
                seen.append(scheduler.slo_viewer.view(running).may_sit_out)
        return requests(8) if iteration == 1 else []

    argv = ["--max-total-tokens", "4000", "--disable-overlap-schedule", *EXACT]
    real.run(script, len(FEATURES), argv, folder, True, TOKENIZER)
    assert seen == [True, False]


def _req(**params: Any) -> Req:
    sampling = SamplingParams(**params)
    sampling.normalize(None)
    return Req("r", "", array("q", [5, 6, 7]), sampling)


# -- parts share nothing


def test_no_list_or_count_is_shared_between_the_parts_of_a_batch(folder: Path) -> None:
    """Also where all are taken, and after a merge into an empty batch, whose own state may be gone by then."""
    seen: list[int] = []

    def script(scheduler: Any, iteration: int) -> list[Any]:
        running = scheduler.running_batch
        if len(running.reqs) > 2 and not seen:
            for taken in (len(running.reqs), 2):
                part, rest = batches.divide(running, np.arange(taken))
                for batch in (part, rest):
                    assert batch.sampling_info.penalizer_orchestrator.batch is batch
                _share_nothing(part, rest)
                _share_nothing(part.sampling_info, rest.sampling_info)
                running = batches.merged(rest, part)
                seen.append(len(running.reqs))
                assert running.sampling_info.penalizer_orchestrator.reqs() is running.reqs
            scheduler.running_batch = running
        return requests(20) if iteration == 1 else []

    argv = ["--max-total-tokens", "4000", "--disable-overlap-schedule", *EXACT]
    run = real.run(script, len(FEATURES), argv, folder, True, TOKENIZER)
    assert len(seen) == 2 and len(run.tokens) == len(FEATURES)


def _share_nothing(one: Any, other: Any) -> None:
    for name, value in vars(one).items():
        if isinstance(value, list | dict):
            assert value is not getattr(other, name), name


def test_an_abort_of_one_that_sits_out_ends_it_alone(folder: Path) -> None:
    sent, aborted = requests(20), []

    def script(scheduler: Any, iteration: int) -> list[Any]:
        if iteration == 1:
            _every_other(scheduler)
            return sent
        outside = [r for r in scheduler.running_batch.reqs if r.rid == "frequency"]
        if scheduler.slo_split is not None and outside and not aborted:
            aborted.append(iteration)
            return [AbortReq(rid="frequency")]
        return []

    argv = ["--max-total-tokens", "4000", "--slo-length", "none", *EXACT]
    run = real.run(script, len(FEATURES), argv, folder, True, TOKENIZER)
    assert aborted and run.aborted == ["frequency"]
    same(run, alone(20, "overlap", folder), missing="frequency")
    nothing_is_left(run)
