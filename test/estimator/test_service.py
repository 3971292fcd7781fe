"""The service learns as requests finish, and whatever goes wrong costs it a level, never an answer."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import by_class, prompts

from sglang_slo.config import SloConfig
from sglang_slo.core.lengths import MEDIAN, QUANTILES, bound_total_tokens
from sglang_slo.estimator import store
from sglang_slo.estimator.features import ArrivalFeatures, encode
from sglang_slo.estimator.service import LengthService
from sglang_slo.estimator.training import offline

STEADY, TURNED = (0.7, 0.25, 0.05), (0.05, 0.25, 0.7)


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory) -> bytes:
    requests, lengths = prompts(250)
    path = tmp_path_factory.mktemp("model") / store.CURRENT
    store.save(path, offline(encode(requests), lengths, seed=0))
    return path.read_bytes()


def _stream(service: LengthService, n: int, shares=STEADY, seed: int = 0, start_s: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    covered = np.zeros((n, len(QUANTILES)), bool)
    for i in range(n):
        request, length = by_class(rng, shares)
        issued = service.predict([request])
        covered[i] = np.log(length) <= issued[0] + 1e-9
        service.finished(request, length)
        service.poll(start_s + i)
    return covered


def _serves(service: LengthService) -> bool:
    logs = service.predict([ArrivalFeatures(500, text="Write an essay"), ArrivalFeatures(7)])
    bound = bound_total_tokens(logs, 0.9, np.array([500, 7]))
    return logs.shape == (2, len(QUANTILES)) and bool(np.isfinite(logs).all()) and 1 <= bound[0] <= 500


def _wait_for(service: LengthService, counter: str, limit_s: float = 600.0) -> None:
    end = time.monotonic() + limit_s
    while not service.counters[counter] and time.monotonic() < end:
        service.poll(0.0)
        time.sleep(0.02)
    assert service.counters[counter], service.metrics()


def test_levels_are_climbed_as_requests_finish():
    service = LengthService(SloConfig(), trainer="inline")
    seen = []
    rng = np.random.default_rng(0)
    for i in range(230):
        if not seen or seen[-1] != service.level:
            seen.append(service.level)
        request, length = by_class(rng, STEADY)
        service.predict([request])
        service.finished(request, length)
        service.poll(float(i))
    assert seen == ["declared maximum", "class quantiles", "xgboost"]
    assert service.predicted["global quantiles"] > 0


def test_who_came_before_anything_was_known_is_predicted_anew_and_calibrates_nothing():
    service = LengthService(SloConfig(), trainer="inline")
    early = ArrivalFeatures(8192, text="Write an essay")
    at_first, knew = service.predict([early]), service.knowledge
    _stream(service, 20)
    assert service.knowledge != knew
    assert (service.again([early]) < at_first).all()
    before = service.calibration.updates
    service.finished(early, 5000)
    assert service.calibration.updates == before


def test_coverage_holds_through_a_turn_of_the_class_mix():
    service = LengthService(SloConfig(), trainer="inline")
    _stream(service, 700)
    _stream(service, 250, TURNED, seed=1, start_s=700)
    after = _stream(service, 500, TURNED, seed=2, start_s=950).mean(axis=0)
    assert np.abs(after - QUANTILES)[[MEDIAN, 5, 6, 7]].max() < 0.03


def test_the_same_stream_gives_the_same_predictions_bit_for_bit():
    both = []
    for _ in range(2):
        service = LengthService(SloConfig(), trainer="inline", seed=3)
        _stream(service, 220)
        both.append(service.predict([by_class(np.random.default_rng(5), STEADY)[0]]).tobytes())
    assert both[0] == both[1]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "version", "empty", "folder"])
def test_a_damaged_model_falls_back_to_the_one_before(tmp_path, model_bytes, damage):
    current = tmp_path / store.CURRENT
    (tmp_path / store.PREVIOUS).write_bytes(model_bytes)
    if damage == "folder":
        current.mkdir()
    else:
        bad = {
            "truncated": model_bytes[:-99],
            "empty": b"",
            "version": model_bytes.replace(b"LENGTHS 1", b"LENGTHS 9"),
        }
        current.write_bytes(bad.get(damage, model_bytes[:-9] + b"123456789"))
    service = LengthService(SloConfig(), trainer="inline", store_dir=tmp_path)
    assert service.level == "previous"
    assert service.metrics()["store_errors"] == 1
    assert _serves(service) and service.predicted["previous"] == 2


def test_no_usable_model_at_all_still_serves_and_says_so(tmp_path):
    for name in (store.CURRENT, store.PREVIOUS, store.SNAPSHOT):
        (tmp_path / name).write_bytes(b"not a model")
    service = LengthService(SloConfig(), trainer="inline", store_dir=tmp_path)
    assert service.level == "declared maximum"
    assert service.metrics()["store_errors"] == 3
    assert _serves(service)


def test_a_missing_folder_still_serves(tmp_path):
    service = LengthService(SloConfig(), store_dir=tmp_path / "not" / "there")
    assert service.level == "declared maximum" and _serves(service)
    assert service.metrics()["store_errors"] == 0
    service.close()


def test_a_model_that_raises_costs_a_level_not_an_answer(tmp_path, model_bytes, monkeypatch):
    (tmp_path / store.CURRENT).write_bytes(model_bytes)
    service = LengthService(SloConfig(), trainer="inline", store_dir=tmp_path)
    monkeypatch.setattr("sglang_slo.estimator.model.LengthModel.predict", lambda *_: 1 / 0)
    assert _serves(service)
    assert service.metrics()["errors"] == 1
    assert "ZeroDivisionError" in str(service.metrics()["last_error"])


def test_features_that_raise_leave_the_declared_maximum(monkeypatch):
    service = LengthService(SloConfig(), trainer="inline")
    monkeypatch.setattr("sglang_slo.estimator.service.encode", lambda *_: 1 / 0)
    assert bound_total_tokens(service.predict([ArrivalFeatures(33)]), 0.9, np.array([33]))[0] == 33


def test_a_child_learns_and_a_restart_takes_its_model_up(tmp_path):
    service = LengthService(SloConfig(), store_dir=tmp_path)
    _stream(service, 220)
    _wait_for(service, "trained")
    assert service.level == "xgboost"
    service.close()
    again = LengthService(SloConfig(), store_dir=tmp_path)
    assert again.level == "xgboost" and len(again.reservoir) >= 200
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([store.CURRENT, store.SNAPSHOT])
    again.close()


def test_a_killed_child_changes_nothing(tmp_path, model_bytes):
    (tmp_path / store.CURRENT).write_bytes(model_bytes)
    service = LengthService(SloConfig(), store_dir=tmp_path)
    _stream(service, 220)
    end = time.monotonic() + 600
    while service.trainer.pid is None and time.monotonic() < end:
        time.sleep(0.005)
    os.kill(service.trainer.pid, signal.SIGKILL)
    _wait_for(service, "training_failures")
    assert service.level == "xgboost" and _serves(service)
    assert (tmp_path / store.CURRENT).read_bytes() == model_bytes
    assert "-9" in str(service.metrics()["last_error"])
    service.close()


def test_a_full_disk_is_counted_and_serving_goes_on(tmp_path, monkeypatch):
    def full(path: Path, *parts: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sglang_slo.estimator.reservoir.write_atomically", full)
    service = LengthService(SloConfig(), store_dir=tmp_path)
    _stream(service, 220)
    _wait_for(service, "training_failures")
    assert service.level == "class quantiles" and _serves(service)
    assert "No space left" in str(service.metrics()["last_error"])
    service.close()


def test_a_candidate_that_is_worse_is_not_taken(tmp_path, monkeypatch):
    service = LengthService(SloConfig(), trainer="inline")
    _stream(service, 210)
    before = service._saved
    monkeypatch.setattr("sglang_slo.estimator.training.TOLERANCE", 0.0)
    _stream(service, 210, seed=1, start_s=210)
    assert service.counters["rejected"] == 1 and service._saved is before


def test_kinds_of_predictor_differ_as_named():
    none = LengthService(replace(SloConfig(), length="none"), trainer="inline")
    mean = LengthService(replace(SloConfig(), length="mean"), trainer="inline")
    for service in (none, mean):
        _stream(service, 250)
    assert none.level == "declared maximum" and none.counters["trained"] == 0
    assert mean.level == "global quantiles" and mean.counters["trained"] == 0
    chat, batch = (ArrivalFeatures(8192, slo_class=c) for c in ("chat", "batch"))
    logs = mean.predict([chat, batch])
    assert logs[0].tolist() == logs[1].tolist()


def test_hoeffding_sets_more_aside_than_conformal():
    reserved = []
    for bound in ("conformal", "hoeffding"):
        service = LengthService(replace(SloConfig(), bound=bound), trainer="inline")
        _stream(service, 320)
        requests = [by_class(np.random.default_rng(8), STEADY)[0] for _ in range(20)]
        reserved.append(bound_total_tokens(service.predict(requests), 0.9, np.full(20, 8192)).sum())
    assert reserved[1] > reserved[0]


def test_what_is_kept_does_not_grow_with_a_fast_stream():
    service = LengthService(replace(SloConfig(), length="mean"), trainer="inline")
    request = ArrivalFeatures(100)
    for i in range(3000):
        service.predict([request])
        service.finished(request, 10 + i % 50)
    assert not service._pending and len(service.reservoir) == 0


def test_a_trainer_of_another_name_is_refused():
    with pytest.raises(ValueError, match="trainer: need child or inline"):
        LengthService(SloConfig(), trainer="thread")
