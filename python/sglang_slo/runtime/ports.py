"""What the parts of the runtime see of SGLang's scheduler, and no more. None of them is handed the scheduler itself.

`kv` the device's pool, `waiting` the queue, `requests` the rows of live requests, `settings`: the four doors. Beside them
what all ranks know alike (`Agreed`), how far this iteration has come (`Iteration`), and where trouble is told (`Trouble`).
Each is small enough to be faked: see test/fakes.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sglang_slo import clock
from sglang_slo.core import pages
from sglang_slo.runtime.sglang import pools
from sglang_slo.runtime.sglang.kv import allocated_tokens

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ScheduleBatch

    from sglang_slo.config import SloConfig
    from sglang_slo.core.iteration_plan import IterationPlan
    from sglang_slo.core.latency import LatencyModel
    from sglang_slo.observe.observer import Observer
    from sglang_slo.runtime.requests.registry import RequestRegistry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tick:
    """One iteration's news from rank 0. Times in seconds on rank 0's clock."""

    now_s: float
    ended: list[tuple[int, float]] = field(default_factory=list)  # (iteration, when its results were out)
    model: LatencyModel | None = None  # a refitted latency model, when there is one
    # request id -> predicted length, of those that arrive, and of live ones about which more is known now
    log_quantiles: dict[str, list[float]] = field(default_factory=dict)
    revised: bool = False  # whether there are live ones among them
    confidence: float = 0.9  # of length bounds, at the present load
    swap: tuple[float, float] | None = None  # (overhead s, bytes per s) of swap transfers, newly measured
    vote: bool = False  # whether the ranks are to tell each other now if their copies from the host came well
    lengths_trusted: bool = False  # whether predicted lengths have beaten the marginal on finished requests


@dataclass(frozen=True)
class KvPool:
    """The device's KV: the prefix tree over it, the allocator of its slots, and the table of rows and slots."""

    tree: Any
    allocator: Any
    rows: Any
    capacity_tokens: int
    page_tokens: int = 1  # slots are given and taken back in pages of so many
    held: dict[Req, None] = field(default_factory=dict)  # half-prefilled ones that wait with KV of their own
    window: pools.Window | None = None  # the pool of layers that look back over a window, where there are any

    def free_tokens(self) -> int:
        """Free and evictable KV, and what those hold who can be made to start again."""
        held = sum(pages.whole(allocated_tokens(req), self.page_tokens) for req in self.held)
        return self.unheld_tokens() + held

    def unheld_tokens(self) -> int:
        """Free and evictable KV."""
        return pools.free_tokens(self.allocator, self.tree)

    def window_free_tokens(self) -> int:
        """Free and evictable KV of the window's pool, where there is one."""
        return pools.window_free_tokens(self.allocator, self.tree)

    def has(self, tokens: int) -> bool:
        """Whether so much is free, or can be had, of every pool."""
        return self.free_tokens() >= tokens and (self.window is None or self.window_free_tokens() >= tokens)

    def low(self, share: float) -> bool:
        """Whether less than this share of a pool is free or can be had."""
        if self.free_tokens() < share * self.capacity_tokens:
            return True
        return self.window is not None and self.window_free_tokens() < share * self.window.capacity_tokens


class Waiting(Protocol):
    """SGLang's queue, and the half-prefilled request that stands before it."""

    reqs: list[Req]
    cut: Req | None

    def grammars(self) -> bool:
        """Whether some wait for a grammar to be compiled."""

    def admit_ready_grammars(self) -> None:
        """Put those whose grammar is ready into the queue."""

    def order(self, running: ScheduleBatch) -> None:
        """Bring the queue into SGLang's own order."""


@dataclass(frozen=True)
class Running:
    """The running batch as a plan divides it. `part`: who decodes; `rest`: who sits out, None where that is nobody."""

    whole: ScheduleBatch
    part: ScheduleBatch
    rest: ScheduleBatch | None


class Batches(Protocol):
    """Where SGLang keeps the batches that it knows of."""

    @property
    def iteration_number(self) -> int:
        """Iterations launched so far."""

    @property
    def chunk_tokens(self) -> int | None:
        """The longest chunk that SGLang's flags permit; None: no limit."""

    @property
    def stock_ratio(self) -> float:
        """What share of the declared output SGLang's own admission reckons with at present."""

    def running(self) -> list[Req]:
        """Requests of SGLang's running batch."""

    def all(self) -> Iterable[ScheduleBatch | None]:
        """The running batch, the last one, and those whose results wait."""

    def results_wait(self) -> bool:
        """Whether results of an iteration are still to be processed."""

    def decode_batch(self, reqs: list[Req]) -> ScheduleBatch:
        """A batch of requests whose KV is on the device up to their last token."""

    def request_slots(self, running: int) -> int:
        """Requests that may be added to `running` ones."""

    # what `build_prefill` made, whatever raised behind it; None: nothing since it was last forgotten
    built: NextBatchPlan | None

    def build_prefill(
        self, planned: dict[Req, int], loads: set[Req], mixed: bool, running: Running
    ) -> NextBatchPlan:
        """`built`: SGLang's own prefill batch of exactly the planned requests, and who goes on decoding.

        `loads`: those of them whose KV in host memory is loaded; `mixed`: `running.part` is in the batch.
        """


@dataclass(frozen=True)
class Ranks:
    """The tensor-parallel group."""

    size: int = 1
    group: Any = None


@dataclass
class Agreed:
    """What all ranks know alike: the last tick, and the latency model in force."""

    tick: Tick
    model: LatencyModel

    @property
    def now_s(self) -> float:
        """The time at which this iteration is planned."""
        return self.tick.now_s


@dataclass
class Iteration:
    """How far the planning of this iteration has come. `running` follows at the moment of each change."""

    running: ScheduleBatch
    step: NextBatchPlan | None = None  # what this planning has built
    plan: IterationPlan | None = None
    split: ScheduleBatch | None = None  # a part of the running batch that was launched alone
    aside: ScheduleBatch | None = None  # the rest of it, until this planning has ended
    loads: set[Req] = field(
        default_factory=set
    )  # of those to be prefilled, who has KV loaded from host memory
    plan_s: float = 0.0  # time that planning took
    next_in_line: list[int] = field(default_factory=list)


class UnbuiltError(RuntimeError):
    """SGLang raised while it built a batch of `reqs`: they are in no queue any more, and hold nothing."""

    def __init__(self, reqs: list[Req]) -> None:
        super().__init__("SGLang could not build the batch that this request was in")
        self.reqs = reqs


class Trouble:
    """Around bookkeeping: what raises there is counted and logged; it never stops serving."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    @contextlib.contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Whatever is raised inside is told as trouble with `what`, and goes no further."""
        try:
            yield
        except Exception as error:
            self.failed(what, error)

    def failed(self, what: str, error: Exception) -> None:
        """Noting `what` raised."""
        self.happened(f"noting {what} failed", error)

    def happened(self, what: str, error: Exception) -> None:
        """Tell it, or at least log it."""
        try:
            self._observer.trouble.happened(what, clock.now(), error)
        except Exception:
            logger.exception("sglang-slo: %s, and so did telling of it", what)


@dataclass(frozen=True)
class Ports:
    """All doors of one scheduler. `tell`: sends an answer about a request to its client."""

    kv: KvPool
    waiting: Waiting
    requests: RequestRegistry
    settings: SloConfig
    batches: Batches
    agreed: Agreed
    iteration: Iteration
    trouble: Trouble
    tell: Callable[[Any, Any], None]
    ranks: Ranks = field(default_factory=Ranks)

    def rows(self, reqs: list[Req]) -> Any:
        """Rows of the table, int[n]."""
        return self.requests.rows(reqs)

    def ready_s(self) -> float:
        """When the iterations in flight are predicted to have ended."""
        return self.requests.ready_s(self.agreed.now_s)
