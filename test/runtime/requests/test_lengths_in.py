"""What the predictor is told of requests as they arrive and end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import real_scheduler as real
from sglang_slo.config import SloConfig
from sglang_slo.core.latency import Coefficients, LatencyModel
from sglang_slo.core.slo import Slo, SloClass
from sglang_slo.estimator.features import ArrivalFeatures
from sglang_slo.estimator.service import LengthService
from sglang_slo.runtime.requests import lengths
from sglang_slo.runtime.requests.lengths import ArrivingLengths, features_of
from sglang_slo.runtime.requests.registry import attainable


def test_without_prediction_nothing_is_learnt_however_much_has_finished() -> None:
    service = LengthService(SloConfig(length="none"), "inline")
    live = ArrivalFeatures(declared_max=4096, rid="live", token_ids=[1, 2, 3])
    service.predict([live])
    before = service.knowledge
    for i in range(64):
        one = ArrivalFeatures(declared_max=4096, rid=str(i), token_ids=[1, 2, 3])
        service.predict([one])
        service.finished(one, 100 + i)
    assert service.knowledge == before
    assert np.exp(service.again([live])).round() == pytest.approx(4096)


@pytest.mark.parametrize("default", ["chat", None])
def test_a_request_without_a_class_is_predicted_as_what_it_is_logged_as(default: str | None) -> None:
    config = SloConfig(classes={"chat": SloClass(500.0, 50.0)}, default_class=default)
    request = real.request("r", [5, 6, 7], 4)
    assert features_of(request, config).slo_class == (default or "default")
    named = real.request("r", [5, 6, 7], 4, custom_params={"slo": {"class": "chat"}})
    assert features_of(named, config).slo_class == "chat"


def test_requests_whose_end_is_never_told_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "MOST_KNOWN", 8)
    arriving = ArrivingLengths(LengthService(SloConfig(), "inline"), SloConfig())
    for i in range(50):
        arriving.predict([real.request(f"r{i}", [5, 6, 7], 4)])
    assert list(arriving._known) == [f"r{i}" for i in range(42, 50)]


def test_a_limit_is_judged_by_what_is_left_to_compute() -> None:
    model = LatencyModel(Coefficients(6e-3, 1e-3, 27e-6, 1.3e-9, 4e-3, 33e-9))
    slo = Slo(1.0, 0.05)
    assert attainable(slo, 32_000, model) == (Slo(np.inf, 0.05), True)
    assert attainable(slo, 32_000, model, 31_500) == (slo, False)


def test_a_conversation_in_the_cache_keeps_its_limit(tmp_path: Any) -> None:
    first, seen = next(iter(real.prompts(1, 600))), {}
    tight = {"custom_params": {"slo": {"ttft_ms": 12.0}}}

    def script(scheduler: Any, iteration: int) -> list[Any]:
        for req in scheduler.slo_registry.reqs.values():
            seen[req.rid] = req.slo_unattainable
        if iteration == 1:
            scheduler.slo_ports.agreed.model = LatencyModel(Coefficients(1e-3, 1e-4, 1e-4, 1e-9, 1e-3, 1e-9))
            return [real.request("new", first, 4, **tight)]
        if scheduler.is_fully_idle() and "again" not in seen:
            seen["again"] = None
            return [real.request("again", [*first, 7, 8, 9], 4, **tight)]
        return []

    real.run(script, 2, ["--max-total-tokens", "4000", "--slo-length", "none"], tmp_path)
    assert seen == {"new": True, "again": False}
