"""Predictions of output lengths on their way into the table, in a real scheduler."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import real_scheduler as real
from sglang_slo.core.lengths import QUANTILES

LENGTH_TOKENS = 25


def test_what_is_learned_later_is_told_to_requests_that_already_run(tmp_path: Path) -> None:
    requests = [real.request(f"r{i}", prompt, 40) for i, prompt in enumerate(real.prompts(2, 30))]
    before: dict[str, float] = {}
    after: dict[str, float] = {}

    def known(scheduler: Any) -> dict[str, float]:
        """The length each is taken to have, in all."""
        table, reqs = scheduler.slo_registry.table, scheduler.slo_registry.reqs
        return {
            req.rid: float(table.expected_tokens[row] + table.output_tokens[row]) for row, req in reqs.items()
        }

    def script(scheduler: Any, iteration: int) -> list[Any]:
        if iteration == 1:
            return requests
        if len(known(scheduler)) == 2 and not before:
            before.update(known(scheduler))
            news = {"r1": [math.log(LENGTH_TOKENS)] * len(QUANTILES)}
            scheduler.slo_lengths.revised = lambda: news
        elif len(known(scheduler)) == 2 and scheduler.slo_tick.revised:
            after.update(known(scheduler))
            scheduler.slo_lengths.revised = dict
        return []

    real.run(script, 2, ["--max-total-tokens", "2000"], tmp_path)
    assert before["r1"] != pytest.approx(LENGTH_TOKENS, abs=2)
    assert after["r1"] == pytest.approx(LENGTH_TOKENS, abs=2)
    assert after["r0"] != pytest.approx(LENGTH_TOKENS, abs=2)
