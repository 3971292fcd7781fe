"""What the books make of bursts: tokens are counted when results are in, times when their end is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("sglang.srt.managers.schedule_batch")

from fakes import MODEL, FakeRequest
from sglang_slo.config import SloConfig
from sglang_slo.core.latency import decode_shape
from sglang_slo.core.slo import GapRule, Slo
from sglang_slo.core.steps import DecodeStep
from sglang_slo.runtime.requests.registry import Launch, RequestRegistry


def registry_of(reqs: list[Any], slo: Slo) -> RequestRegistry:
    registry = RequestRegistry(SloConfig(length="none"), step=DecodeStep(4, 8))
    for req in reqs:
        req.sampling_params.json_schema = req.sampling_params.regex = None
        req.sampling_params.ebnf = req.sampling_params.structural_tag = None
        registry.open(req, slo, 0.0, MODEL)
    return registry


def iteration(
    registry: RequestRegistry, number: int, reqs: list[Any], bursts: list[int], end_s: float
) -> None:
    """Launched, its results processed, its end measured."""
    rows = registry.rows(reqs)
    shape = decode_shape(len(reqs), 100, beside_prefill=number == 1)  # the first token comes of a prefill
    registry.launch(Launch(number, rows, registry.table.seq[rows], shape, end_s - 0.1, 0.1, end_s))
    for req, burst in zip(reqs, bursts, strict=True):
        req.output_ids += [1] * burst
    registry.tokens_out(reqs)
    registry.ended(number, end_s)


def test_a_burst_is_one_gap_and_as_many_tokens_as_it_holds() -> None:
    reqs = [FakeRequest(output_tokens=100), FakeRequest(output_tokens=100)]
    registry = registry_of(reqs, Slo(tbt_s=0.15))
    table, rows = registry.table, registry.rows(reqs)
    iteration(registry, 1, reqs, [1, 1], 1.0)
    iteration(registry, 2, reqs, [4, 1], 1.1)
    iteration(registry, 3, reqs, [2, 3], 1.3)
    assert table.gaps[rows].tolist() == [2, 2] or table.gaps[rows].tolist() == [3, 3]
    assert table.missed_gaps[rows].tolist() == [1, 1]
    assert table.out_tokens[rows].tolist() == [7, 5]
    assert table.remaining_tokens[rows].tolist() == [93, 95]
    assert table.tokens_per_step == pytest.approx(10 / 4, abs=0.01)


def test_a_reader_at_a_steady_pace_waits_for_the_first_token_of_a_burst() -> None:
    req = FakeRequest(output_tokens=100)
    registry = registry_of([req], Slo(tbt_s=0.1, gap_rule=GapRule.PACE))
    iteration(registry, 1, [req], [1], 1.0)
    iteration(registry, 2, [req], [4], 1.1)
    row = registry.rows([req])
    iteration(registry, 3, [req], [4], 1.5)  # five were out: the sixth is due half a second after the first
    assert not registry.table.lost[row].any()
    iteration(registry, 4, [req], [4], 2.0)  # nine were out
    assert registry.table.lost[row].all()


def test_a_dropped_burst_counts_nothing() -> None:
    req = FakeRequest(output_tokens=100)
    registry = registry_of([req], Slo(tbt_s=0.15))
    iteration(registry, 1, [req], [1], 1.0)
    row = registry.rows([req])
    registry.launch(Launch(2, row, registry.table.seq[row], decode_shape(1, 100), 1.0, 0.1, 1.1))
    registry.drop_in_flight(int(row[0]))
    registry.tokens_out([req])
    registry.ended(2, 1.1)
    assert registry.table.out_tokens[row].tolist() == [1] and registry.table.inflight_tokens[
        row
    ].tolist() == [0]


def test_of_a_lone_request_a_mean_per_token_is_kept_by_full_bursts() -> None:
    """What a step takes is shared by the tokens it may give: a limit between the two is honoured, not given up."""
    alone_s = MODEL.iteration_s(decode_shape(1, 20, verified=4))
    req = FakeRequest(output_tokens=100)
    registry = registry_of([req], Slo(tpot_s=alone_s / 2, tbt_s=alone_s / 2))
    row = registry.rows([req])
    assert np.isfinite(registry.table.tpot_s[row]).all() and not np.isfinite(registry.table.tbt_s[row]).any()
