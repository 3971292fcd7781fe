"""Predictions are trusted only where they say more than the lengths seen so far do."""

from __future__ import annotations

import numpy as np

from sglang_slo.core.length_gate import LEAST, REFRESH, LengthGate
from sglang_slo.core.lengths import QUANTILES


def _scored(informed: bool, requests: int = 400, seed: int = 0) -> LengthGate:
    """Two kinds of requests, of some 50 and some 2,000 tokens; the predictor knows the kind, or only the mixture."""
    rng, gate = np.random.default_rng(seed), LengthGate()
    kinds = [np.log(50) + 0.3 * rng.normal(size=2000), np.log(2000) + 0.3 * rng.normal(size=2000)]
    known = [np.quantile(kind, QUANTILES) for kind in kinds]
    mixture = np.quantile(np.concatenate(kinds), QUANTILES)
    for _ in range(requests):
        kind = int(rng.integers(2))
        gate.finished(known[kind] if informed else mixture, int(np.exp(rng.choice(kinds[kind]))))
    return gate


def test_who_knows_the_kind_of_a_request_is_trusted() -> None:
    assert _scored(informed=True).trusted


def test_who_knows_no_more_than_the_mixture_is_not() -> None:
    gate = _scored(informed=False)
    assert not gate.trusted and abs(gate.saved) < 0.1


def test_nothing_is_trusted_before_enough_has_finished() -> None:
    assert not _scored(informed=True, requests=LEAST + REFRESH - 1).trusted
    assert _scored(informed=True, requests=LEAST + 4 * REFRESH).trusted


def test_trust_is_lost_when_the_traffic_changes() -> None:
    gate = _scored(informed=True)
    for _ in range(300):
        gate.finished(np.full(len(QUANTILES), np.log(50)), 2000)
    assert not gate.trusted
