"""What planning reads of the settings, and what it says: the plan of one iteration, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sglang_slo.core.kv.preemption import PreemptMode


@dataclass(frozen=True)
class IterationPlan:
    """What the next iteration does. `prefill`: (row, tokens) in order, only the last may be cut short of its need.

    `victims` leave the running batch and `returns` begin to come back before anything else is done; `decode` names places
    in the running batch that is left then.
    """

    prefill: list[tuple[int, int]] = field(default_factory=list)
    loads: list[int] = field(
        default_factory=list
    )  # of these, rows whose KV in host memory is loaded, not computed
    decode: np.ndarray | None = None  # None: all
    mixed: bool = False
    victims: list[tuple[int, PreemptMode]] = field(default_factory=list)  # (row, mode)
    park_chunked: bool = False  # the half-prefilled request lets go of its KV
    returns: list[int] = field(default_factory=list)  # rows that begin to come back from the host
    overdue: int = -1  # of those that get in, the one that nobody may overtake any more
    predicted_s: float = 0.0
    budget_s: float = 0.0
    next_in_line: list[int] = field(default_factory=list)  # rows that did not get in this time, nearest first
    deferred: list[int] = field(default_factory=list)  # rows that let another compute their prefix first
    shed: list[int] = field(default_factory=list)  # rows that would wait longer than the queue limit
    hopeless: list[int] = field(
        default_factory=list
    )  # rows that cannot meet their limits; if these are refused
    feasible: int = 0  # waiting requests that can still meet their deadline
    infeasible: int = 0  # waiting requests that cannot, or have none


class PlanSettings(Protocol):
    """What planning reads of the settings; `SloConfig` says what each means and accepts."""

    @property
    def order(self) -> str: ...
    @property
    def chunk(self) -> str: ...
    @property
    def packing(self) -> str: ...
    @property
    def mix(self) -> str: ...
    @property
    def park(self) -> bool: ...
    @property
    def decode_buckets(self) -> bool: ...
    @property
    def lost_share(self) -> float: ...
    @property
    def lost_wait_s(self) -> float | None: ...
    @property
    def queue_limit_s(self) -> float | None: ...
    @property
    def refuse(self) -> str: ...
    @property
    def margin(self) -> float: ...
    @property
    def idle_cap_ms(self) -> float: ...
    @property
    def preempt(self) -> str: ...
    @property
    def victims(self) -> str: ...
    @property
    def kv(self) -> str: ...
