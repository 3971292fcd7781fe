"""Predictors of the twin differ in what they may know, and nobody but the knowing ones sees a true length."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_slo.config import SloConfig
from sglang_slo.core.lengths import QUANTILES, bound_total_tokens
from sglang_slo.estimator.features import ArrivalFeatures
from sglang_slo.twin.predictors import make

HIDDEN = {f"r{i}": int(n) for i, n in enumerate(np.random.default_rng(0).integers(1, 900, 400))}
REQUESTS = [ArrivalFeatures(8192, rid=rid) for rid in HIDDEN]
TRUE = np.array(list(HIDDEN.values()))


class _Untouchable(dict):
    def __getitem__(self, key: str) -> int:
        raise AssertionError("a true length was read")


def test_the_oracle_knows_and_the_noisy_one_is_honest_about_its_noise():
    oracle = make("oracle", SloConfig(), HIDDEN).predict(REQUESTS)
    assert bound_total_tokens(oracle, 0.9, np.full(len(TRUE), 8192)).tolist() == TRUE.tolist()
    noisy = make("noisy", SloConfig(), HIDDEN, sigma=0.6).predict(REQUESTS)
    covered = (np.log(TRUE)[:, None] <= noisy + 1e-9).mean(axis=0)
    assert np.abs(covered - QUANTILES).max() < 0.06


def test_noise_belongs_to_the_request_not_to_the_order_of_asking():
    noisy = make("noisy", SloConfig(), HIDDEN, seed=4)
    together = noisy.predict(REQUESTS[:5])
    assert together[3].tolist() == noisy.predict(REQUESTS[3:4])[0].tolist()


@pytest.mark.parametrize("name", ["xgboost", "mean", "none"])
def test_predictors_that_learn_never_read_a_true_length(name):
    predictor = make(name, SloConfig(), _Untouchable())
    assert predictor.predict([ArrivalFeatures(64, rid="r0")]).shape == (1, len(QUANTILES))
    assert predictor.level == "declared maximum"


def test_a_name_that_is_none_is_refused_and_shifted_needs_a_model():
    with pytest.raises(ValueError, match="predictor: need one of xgboost, mean"):
        make("crystal ball", SloConfig(), {})
    with pytest.raises(ValueError, match="shifted: need the folder"):
        make("shifted", SloConfig(), {})
