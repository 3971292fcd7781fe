"""The model learns what text and classes tell, says the same twice, and survives its file."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import by_class, prompts

from sglang_slo.core.lengths import MEDIAN, QUANTILES
from sglang_slo.estimator.features import ArrivalFeatures, encode
from sglang_slo.estimator.model import fit, pinball


@pytest.fixture(scope="module")
def fitted():
    requests, lengths = prompts(400)
    return fit(encode(requests), lengths, seed=1, max_rounds=40)


def test_words_of_a_prompt_tell_its_length(fitted):
    requests, lengths = prompts(150, seed=9)
    guess = np.exp(fitted.predict(encode(requests))[:, MEDIAN])
    constant = np.abs(lengths - np.median(lengths)).mean()
    assert np.abs(lengths - guess).mean() < 0.5 * constant


def test_quantiles_are_monotone_finite_and_at_least_one_token(fitted):
    rows = encode([ArrivalFeatures(9, text=t) for t in ("", "hi", "Write " * 900)] + [ArrivalFeatures(9)])
    raw = fitted.predict(rows)
    assert raw.shape == (4, len(QUANTILES)) and np.isfinite(raw).all()
    assert (np.diff(raw, axis=1) >= 0).all() and (raw >= 0).all()
    assert fitted.predict(rows[:0]).shape == (0, len(QUANTILES))


def test_same_rows_and_seed_give_the_same_model(fitted):
    requests, lengths = prompts(400)
    again = fit(encode(requests), lengths, seed=1, max_rounds=40)
    rows = encode(prompts(50, seed=4)[0])
    assert fitted.predict(rows).tobytes() == again.predict(rows).tobytes()


def test_classes_and_prompt_lengths_are_enough_without_text():
    rng = np.random.default_rng(0)
    made = [by_class(rng, (0.4, 0.3, 0.3)) for _ in range(500)]
    rows, lengths = encode([r for r, _ in made]), np.array([n for _, n in made])
    raw = fit(rows[:400], lengths[:400], max_rounds=30).predict(rows[400:])
    everybody = np.log(np.tile(np.quantile(lengths[:400], QUANTILES), (100, 1)))
    assert pinball(raw, lengths[400:]) < 0.7 * pinball(everybody, lengths[400:])


def test_too_few_rows_are_refused_by_count():
    requests, lengths = prompts(10)
    with pytest.raises(ValueError, match="at least 32"):
        fit(encode(requests), lengths)


def test_the_head_answers_for_training_rows_as_if_it_had_not_seen_them():
    from sglang_slo.estimator import head

    rng = np.random.default_rng(0)
    rows = encode([ArrivalFeatures(9, text=f"word{i} thing{i} item{i}") for i in range(200)])
    noise = np.exp(rng.normal(0, 1, 200))
    _, left_out = head.fit(rows, noise)
    assert abs(np.corrcoef(left_out[:, 0], np.sqrt(noise))[0, 1]) < 0.3
