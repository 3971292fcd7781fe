"""Measured iterations: each one's duration goes to its own shape, though results are processed a pass later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import real_scheduler as real
from sglang_slo import clock

PREFILL_S, DECODE_S = 10.0, 1.0


class Device:
    """Puts a clock into the scheduler that goes on only while a pass runs; notes what is measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.measured = 1000.0, []
        self.batches, self.requests = [], []  # how many each pass had, and is said to have had
        monkeypatch.setattr(clock, "now", lambda: self.now_s)

    def attach(self, scheduler: Any) -> None:
        """Time the passes of this scheduler, and take down what its fit is given."""
        forward = scheduler.tp_worker.forward_batch_generation

        def timed(batch: Any, *args: Any, **kwargs: Any) -> Any:
            self.now_s += PREFILL_S if batch.forward_mode.is_extend() else DECODE_S
            self.batches.append(len(batch.reqs))
            return forward(batch, *args, **kwargs)

        scheduler.tp_worker.forward_batch_generation = timed
        self.window, take = scheduler.slo_fit.window, scheduler.slo_fit.add

        def noted(launch: Any) -> None:
            self.measured.append((launch.shape.extend, launch.duration_s))
            self.requests.append(launch.shape.requests)
            take(launch)

        scheduler.slo_fit.add = noted


@pytest.mark.parametrize("flags", [[], ["--disable-overlap-schedule"]], ids=["overlap", "no overlap"])
def test_each_pass_is_charged_its_own_time(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = Device(monkeypatch)
    requests = [real.request(f"r{i}", prompt, 8) for i, prompt in enumerate(real.prompts(4, 30))]

    def one_every_third_iteration(scheduler: Any, iteration: int) -> list[Any]:
        if iteration == 1:
            device.attach(scheduler)
        return [requests.pop(0)] if iteration % 3 == 1 and requests else []

    real.run(one_every_third_iteration, 4, ["--max-total-tokens", "2000", *flags], tmp_path)
    assert {extend for extend, _ in device.measured} == {True, False}
    wrong = [(e, s) for e, s in device.measured if s != (PREFILL_S if e else DECODE_S)]
    assert not wrong
    assert device.requests == device.batches[: len(device.requests)] and max(device.requests) > 1
    # none is taken for one that found the device idle
    assert len(device.window.recent()) == len(device.measured)
