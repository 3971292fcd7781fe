"""The virtual engine: one device whose passes take modelled time, and the clock that the scheduler sees.

    schedule n   schedule n+1          schedule n+2
    |launch n    |launch n+1           |launch n+2
    [== compute n ===========][== compute n+1 ======][== ...
                 | result n-1          | result n: its tokens are out

As in SGLang's overlap loop, pass n+1 is planned and launched while pass n computes, then the loop waits for
the result of pass n. A pass begins at its launch or at the end of the one before, whichever is later. The
clock never runs backwards, and only this module moves it.
"""

from __future__ import annotations

import numpy as np

from sglang_slo.twin.devices.device import Device, Pass, with_drafts_s


class VirtualEngine:
    """Keeps `now_s` and `busy_until_s`, the end of the last launched pass; seconds since the run began."""

    def __init__(self, device: Device, noise_sigma: float = 0.0, seed: int = 0) -> None:
        self.device = device
        self.now_s = 0.0
        self.busy_until_s = 0.0
        self.swapped_tokens = 0  # KV that went to the host so far
        self._schedule_s, self._process_s = device.cpu_times_s
        self._sigma = noise_sigma
        self._ends_s = 0.0  # the next pass at the earliest
        self._rng = np.random.default_rng([seed, 0x5EED])

    def now(self) -> float:
        """The clock, for `sglang_slo.clock.use`."""
        return self.now_s

    def launch(self, load: Pass) -> tuple[float, float]:
        """Launch a pass: (start, end), seconds."""
        self.now_s += self._schedule_s
        duration = with_drafts_s(self.device, load)
        if self._sigma > 0:
            # Mean 1, so that noise changes the spread and not the capacity.
            duration *= float(self._rng.lognormal(-(self._sigma**2) / 2, self._sigma))
        start = max(self.now_s, self.busy_until_s)
        self.busy_until_s = max(start + duration, self._ends_s)
        return start, self.busy_until_s

    def spend(self, seconds: float) -> None:
        """CPU time of the scheduler goes by before its next launch; the pass in flight goes on meanwhile."""
        self.now_s += seconds

    def not_before(self, time_s: float) -> None:
        """The next pass begins at `time_s` at the earliest: it needs something that is there then."""
        self.busy_until_s = max(self.busy_until_s, time_s)

    def ends_after(self, time_s: float) -> None:
        """The next pass ends at `time_s` at the earliest: what it needs comes layer by layer until then."""
        self._ends_s = max(self._ends_s, time_s)

    def wait_until(self, time_s: float) -> None:
        """Let time pass up to `time_s`; nothing if that is over already."""
        self.now_s = max(self.now_s, time_s)

    def take_result(self, end_s: float) -> None:
        """Wait for a pass that ends at `end_s` and spend the CPU time of processing its result."""
        self.wait_until(end_s)
        self.now_s += self._process_s
