"""Fakes of the runtime's doors (`runtime.ports`): a queue, a pool, batches and requests without a scheduler behind them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

from sglang_slo.config import SloConfig
from sglang_slo.core.latency import Coefficients, LatencyModel
from sglang_slo.observe.observer import Observer
from sglang_slo.runtime.ports import Agreed, Iteration, KvPool, Ports, Tick, Trouble
from sglang_slo.runtime.requests.features import ALL
from sglang_slo.runtime.requests.registry import RequestRegistry
from sglang_slo.runtime.sglang import kv

MODEL = LatencyModel(Coefficients(2e-3, 1e-3, 5e-5, 0.0, 2e-3, 1e-8), 1.25, name="fake", measured=True)
CAPACITY_TOKENS = 1000
_ids = itertools.count()


class FakeTree:
    """A prefix tree that finds nothing; `evictable` tokens may go. Locks are counted by node."""

    def __init__(self) -> None:
        self.evictable, self.root_node = 0, object()
        self.locks: dict[Any, int] = {}

    def is_tree_cache(self) -> bool:
        return True

    supports_prefix_sharing = is_tree_cache  # newer releases' name

    def evictable_size(self) -> int:
        return self.evictable

    def inc_lock_ref(self, node: Any) -> None:
        self.locks[node] = self.locks.get(node, 0) + 1

    def dec_lock_ref(self, node: Any) -> None:
        self.locks[node] -= 1

    def lock(self, node: Any) -> Any:
        self.inc_lock_ref(node)
        return node

    unlock = dec_lock_ref


class FakeAllocator:
    """A pool with `free` tokens."""

    page_size = 1

    def __init__(self, free: int = CAPACITY_TOKENS) -> None:
        self.free_tokens = free

    def available_size(self) -> int:
        return self.free_tokens


class FakeWaiting:
    """A queue."""

    def __init__(self) -> None:
        self.reqs: list[Any] = []
        self.cut: Any = None
        self.ordered = 0

    def grammars(self) -> bool:
        return False

    def admit_ready_grammars(self) -> None:
        raise AssertionError("nobody waits for a grammar")

    def order(self, running: Any) -> None:
        self.ordered += 1


class FakeBatch:
    """A batch that decodes `reqs`."""

    def __init__(self, reqs: list[Any]) -> None:
        self.reqs, self.batch_is_full = reqs, True
        self.sampling_info = SimpleNamespace(penalizer_orchestrator=SimpleNamespace(is_required=False))

    def is_empty(self) -> bool:
        return not self.reqs

    def filter_batch(self) -> None:
        self.reqs = [req for req in self.reqs if req.finished_reason is None]


class FakeBatches:
    """SGLang's batches. `asked` keeps what was to be built."""

    def __init__(self) -> None:
        self.iteration_number, self.chunk_tokens, self.stock_ratio = 1, None, 0.5
        self.known: list[Any] = []
        self.asked: list[dict[Any, int]] = []
        self.built: Any = None

    def running(self) -> list[Any]:
        return self.known[0].reqs if self.known else []

    def all(self) -> list[Any]:
        return self.known

    def results_wait(self) -> bool:
        return False

    def decode_batch(self, reqs: list[Any]) -> FakeBatch:
        return FakeBatch(reqs)

    def request_slots(self, running: int) -> int:
        return 100 - running

    def build_prefill(self, planned: dict[Any, int], loads: set[Any], mixed: bool, running: Any) -> Any:
        self.asked.append(planned)
        left = running.part if running.rest is None else running.rest
        self.built = SimpleNamespace(batch_to_run=FakeBatch(list(planned)), running_batch=left)
        return self.built


class FakeRequest:
    """A request as the runtime knows one. `slo`: its limits as a client writes them."""

    def __init__(self, prompt_tokens: int = 20, slo: Any = None, output_tokens: int = 10) -> None:
        self.rid = f"r{next(_ids)}"
        self.slo_row, self.slo_slot, self.slo_permits = -1, -1, ALL
        self.origin_input_ids, self.output_ids = [0] * prompt_tokens, []
        self.custom_params = None if slo is None else {"slo": slo}
        self.sampling_params = SimpleNamespace(
            max_new_tokens=output_tokens, custom_params=self.custom_params, n=1
        )
        self.time_stats = SimpleNamespace(
            created_time=0.0,
            set_wait_queue_entry_time=lambda: None,
            trace_ctx=SimpleNamespace(abort=lambda abort_info: None),
        )
        self.extra_key = self.lora_id = self.finished_reason = self.finished_len = self.last_node = None
        self.prefix_indices: list[int] = []
        self.prefix_len, self.lock = 0, None
        nothing = {"req_pool_idx": None, "kv_committed_len": 0, "cache_protected_len": 0}
        self.kv = SimpleNamespace(**nothing) if kv.IN_RECORD else None
        vars(self).update({} if kv.IN_RECORD else nothing)
        self.is_retracted, self.retraction_count = False, 0
        self.looked_up = self.host_hit_length = 0

    def finished(self) -> bool:
        return self.finished_reason is not None

    def init_next_round_input(self, tree: Any) -> None:
        self.looked_up += 1


def doors(config: SloConfig | None = None, free: int = CAPACITY_TOKENS) -> Ports:
    """All doors of a scheduler that is not there. What is told to clients is in `doors.told` of its `tell`."""
    config = config or SloConfig(length="none")
    told: list[tuple[Any, Any]] = []

    def tell(answer: Any, req: Any) -> None:
        told.append((answer, req))

    tell.told = told
    observer = Observer(config, True, None, None)
    ports = Ports(
        kv=KvPool(FakeTree(), FakeAllocator(free), None, CAPACITY_TOKENS),
        waiting=FakeWaiting(),
        requests=RequestRegistry(config),
        settings=config,
        batches=FakeBatches(),
        agreed=Agreed(Tick(100.0), MODEL),
        iteration=Iteration(FakeBatch([])),
        trouble=Trouble(observer),
        tell=tell,
    )
    ports.trouble.observer = observer
    return ports


def troubles(ports: Ports) -> int:
    """How often something was told as trouble."""
    return int(ports.trouble.observer.trouble.count)
