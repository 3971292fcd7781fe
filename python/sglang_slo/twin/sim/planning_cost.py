"""What one planning takes of the scheduler's time, by its size: charged in virtual time, so that it shows in results.

Fitted once to real plannings by `python benchmark/scheduler_cpu.py --fit`, and kept: a run must not depend on how busy
the machine is that simulates it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from sglang_slo.twin.devices.profiles import DATA

KV_SHORT_SHARE = 0.05  # of the pool free or evictable, below which requests ask for room in vain
FILE = DATA / "planning.json"


@dataclass(frozen=True)
class PlanningCost:
    """Seconds: of any planning, more per running and per waiting request, and more where KV is short."""

    base_s: float
    running_s: float
    waiting_s: float
    kv_short_s: float

    def seconds(self, running: int, waiting: int, kv_short: bool) -> float:
        """Of one planning with so many running and waiting requests."""
        return self.base_s + self.running_s * running + self.waiting_s * waiting + self.kv_short_s * kv_short


@lru_cache(maxsize=1)
def fitted() -> PlanningCost:
    """As kept in the package."""
    raw = json.loads(FILE.read_text())
    return PlanningCost(*(float(raw[name]) for name in PlanningCost.__dataclass_fields__))
