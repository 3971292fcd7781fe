"""KV in host memory: a pool of bounded size, copies out of the device and back.

A copy goes to the host once and comes back once, or is dropped. `save` and `load` may return before the bytes
have moved; whoever gives the device slots away or reads them first calls `fence`, which orders all later work
on the device behind the transfer. A copy that fails is no error yet: `ok` says so when the copy is needed.
Sizes are tokens of this rank's share of the KV; the pool's capacity in tokens is the same on all ranks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sglang_slo import clock

logger = logging.getLogger(__name__)

MEASURE_TOKENS = 1024  # size of the copies that are timed at start-up
METER_KEEPS = 64  # transfers that the cost model is fitted to
METER_NEWS = 6  # further ones before it is fitted again

# (buffer on the device, host memory, slots in the buffer)
Move = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(slots=True, eq=False)
class HostCopy:
    """The KV of a request's first `tokens` tokens in host memory."""

    tokens: int
    offset: int = 0  # where it lies in the pool, tokens
    ok: bool = False  # whether the KV is there, or on its way; False: copying out failed, or dropped
    moving: Any = None  # what `fence` waits for


class HostPool(Protocol):
    """Where swapped KV lies. `meter` learns what transfers cost."""

    capacity_tokens: int
    used_tokens: int
    bytes_per_token: float
    hides: bool  # whether transfers run beside compute
    meter: SwapMeter

    def largest_room(self) -> int:
        """Tokens of the largest copy that can be saved now; of several, all together."""
        ...

    def save(self, slots: torch.Tensor) -> HostCopy:
        """Start to copy the KV at device `slots`, int64[tokens], to the host. Call only with room."""
        ...

    def load(self, copy: HostCopy, start: int, slots: torch.Tensor) -> None:
        """Start to copy tokens `start`.. back to device `slots`, int64[tokens - start]. Raises on failure."""
        ...

    def fence(self, copy: HostCopy) -> None:
        """Order later device work behind the copy's last transfer. No wait on the host."""
        ...

    def drop(self, copy: HostCopy) -> None:
        """Give the host memory back."""
        ...


class SwapMeter:
    """Learns what a transfer costs from the last ones: seconds = overhead + bytes / rate."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=METER_KEEPS)  # (bytes, seconds)
        self._new = 0

    def saw(self, n_bytes: float, seconds: float) -> None:
        """Note a finished transfer."""
        self._seen.append((n_bytes, seconds))
        self._new += 1

    @property
    def news(self) -> bool:
        """Enough was seen since the last `fit` for another."""
        return self._new >= METER_NEWS

    def fit(self) -> tuple[float, float] | None:
        """(overhead s, bytes per s), both above 0; None with fewer than two sizes seen.

        The line through the medians of the smaller and the larger half of the transfers: no outlier moves it
        far.
        """
        self._new = 0
        seen = sorted(self._seen)
        half = len(seen) // 2
        if half == 0 or seen[0][0] == seen[-1][0]:
            return None
        (x0, y0), (x1, y1) = _median(seen[:half]), _median(seen[-half:])
        if x1 <= x0:
            return None
        slope = max((y1 - y0) / (x1 - x0), y1 / x1 * 0.1, 1e-15)
        return max(y0 - slope * x0, 1e-6), 1 / slope


def _median(points: list[tuple[float, float]]) -> tuple[float, float]:
    xs, ys = sorted(p[0] for p in points), sorted(p[1] for p in points)
    return xs[len(xs) // 2], ys[len(ys) // 2]


class Extents:
    """First-fit allocation of contiguous runs of `size` tokens."""

    def __init__(self, size: int) -> None:
        self._free = [(0, size)] if size > 0 else []  # (start, length), by start, never touching

    def largest(self) -> int:
        """Longest run that is free."""
        return max((length for _, length in self._free), default=0)

    def take(self, length: int) -> int:
        """Start of a run of `length` that is now taken. Raises MemoryError if there is none."""
        for i, (start, free) in enumerate(self._free):
            if free >= length:
                rest = [(start + length, free - length)] if free > length else []
                self._free[i : i + 1] = rest
                return start
        raise MemoryError(f"no run of {length} tokens is free")

    def give(self, start: int, length: int) -> None:
        """Give a run back; neighbours grow together."""
        runs: list[tuple[int, int]] = []
        for run in sorted([*self._free, (start, length)]):
            if runs and sum(runs[-1]) == run[0]:
                runs[-1] = (runs[-1][0], runs[-1][1] + run[1])
            else:
                runs.append(run)
        self._free = runs


class ArenaHostPool:
    """One buffer of host memory, taken at start-up; pinned, and moved on a stream of its own, if there is a
    GPU.

    A copy lies in one piece: for each of the KV pool's buffers (K and V of each layer) its tokens one after
    another.
    """

    def __init__(self, buffers: list[torch.Tensor], capacity_tokens: int) -> None:
        self.capacity_tokens, self.used_tokens = capacity_tokens, 0
        self.meter = SwapMeter()
        self.bytes_per_token: float = sum(row_bytes(b) for b in buffers)
        self._buffers = buffers
        self.device = buffers[0].device
        self._extents = Extents(capacity_tokens)
        self.hides = on_gpu = buffers[0].is_cuda
        self._arena = torch.empty(
            capacity_tokens * self.bytes_per_token, dtype=torch.uint8, pin_memory=on_gpu
        )
        self._stream = torch.cuda.Stream(buffers[0].device) if on_gpu else None
        self._timed: deque[tuple[Any, Any, float]] = deque()  # (start event, end event, bytes), not read yet

    def largest_room(self) -> int:
        """See HostPool. Scattered free memory is no room."""
        return self._extents.largest()

    def save(self, slots: torch.Tensor) -> HostCopy:
        """See HostPool."""
        copy = HostCopy(len(slots), self._extents.take(len(slots)))
        self.used_tokens += copy.tokens
        try:
            self._move(copy, 0, slots, self._save_buffer)
            copy.ok = True
        except RuntimeError as error:
            logger.warning("sglang-slo: copying %d tokens to the host failed: %s", copy.tokens, error)
        return copy

    def load(self, copy: HostCopy, start: int, slots: torch.Tensor) -> None:
        """See HostPool."""
        self._move(copy, start, slots, self._load_buffer)

    def fence(self, copy: HostCopy) -> None:
        """See HostPool."""
        if copy.moving is not None:
            torch.cuda.current_stream().wait_event(copy.moving)

    def drop(self, copy: HostCopy) -> None:
        """See HostPool. A transfer under way is no obstacle: the next one into this memory is queued behind
        it.
        """
        self._extents.give(copy.offset, copy.tokens)
        self.used_tokens -= copy.tokens
        copy.ok = False

    def _move(self, copy: HostCopy, start: int, slots: torch.Tensor, move: Move) -> None:
        slots = slots.to(torch.int64)
        if self._stream is None:
            began = clock.now()
            self._each_buffer(copy, start, slots, move)
            self.meter.saw(len(slots) * self.bytes_per_token, clock.now() - began)
            return
        self._look_at_times()
        # the slots were written, and may still be read, by what was launched before
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self._each_buffer(copy, start, slots, move)
            end.record()
        slots.record_stream(self._stream)
        copy.moving = end
        self._timed.append((begin, end, len(slots) * self.bytes_per_token))

    def _each_buffer(self, copy: HostCopy, start: int, slots: torch.Tensor, move: Move) -> None:
        base, skipped = copy.offset * sum(map(row_bytes, self._buffers)), start
        for buffer in self._buffers:
            row = row_bytes(buffer)
            first = base + skipped * row
            host = self._arena[first : first + len(slots) * row].view(buffer.dtype)
            move(buffer, host.view(len(slots), *buffer.shape[1:]), slots)
            base += copy.tokens * row

    @staticmethod
    def _save_buffer(buffer: torch.Tensor, host: torch.Tensor, slots: torch.Tensor) -> None:
        host.copy_(buffer.index_select(0, slots), non_blocking=True)

    @staticmethod
    def _load_buffer(buffer: torch.Tensor, host: torch.Tensor, slots: torch.Tensor) -> None:
        buffer.index_copy_(0, slots, host.to(buffer.device, non_blocking=True))

    def wait(self) -> None:
        """Until all transfers are over, and timed."""
        if self._stream is not None:
            self._stream.synchronize()
            self._look_at_times()

    def _look_at_times(self) -> None:
        while self._timed and self._timed[0][1].query():
            begin, end, size = self._timed.popleft()
            self.meter.saw(size, begin.elapsed_time(end) / 1e3)


def row_bytes(buffer: torch.Tensor) -> int:
    """Bytes of one token in a KV buffer of shape [slots, ...]."""
    return buffer[0].numel() * buffer.element_size()


def kv_buffers(kv_pool: Any) -> list[torch.Tensor] | None:
    """The tensors that hold all of the KV of a pool, [slots, ...] each; None if that is not known of its
    kind.
    """
    kind = type(kv_pool).__name__
    if kind == "MHATokenToKVPool" and not getattr(kv_pool, "use_hnd", False):
        return [*kv_pool.k_buffer, *kv_pool.v_buffer]
    if kind == "MLATokenToKVPool":
        return list(kv_pool.kv_buffer)
    return None


def make_host_pool(kv_pool: Any, host_kv_gb: float, ranks: int) -> ArenaHostPool | None:
    """A pool of `host_kv_gb` GB over all `ranks` of the server; None, and a word in the log, if there cannot
    be one.
    """
    if host_kv_gb <= 0:
        return None
    buffers = kv_buffers(kv_pool)
    if buffers is None:
        logger.warning("sglang-slo: no swap: the layout of %s is not known", type(kv_pool).__name__)
        return None
    tokens = int(host_kv_gb * 1e9 / ranks / sum(row_bytes(b) for b in buffers))
    try:
        pool = ArenaHostPool(buffers, tokens)
        measure(pool, min(tokens, buffers[0].shape[0] - 1, MEASURE_TOKENS))
        return pool
    except (RuntimeError, MemoryError) as error:
        logger.warning("sglang-slo: no swap: --slo-host-kv-gb %g: %s", host_kv_gb, error)
        return None


@dataclass(frozen=True)
class HostLink:
    """Copies between the device and memory on the host that is not ours to give: what was measured of them."""

    meter: SwapMeter
    bytes_per_token: float


def measured_link(kv_pool: Any) -> HostLink | None:
    """What copies between `kv_pool` and the host cost, told by a few of our own; None: its layout is not known."""
    pool = make_host_pool(kv_pool, MEASURE_TOKENS * sum(map(row_bytes, kv_buffers(kv_pool) or [])) / 1e9, 1)
    return None if pool is None else HostLink(pool.meter, pool.bytes_per_token)


def measure(pool: ArenaHostPool, slots: int) -> None:
    """Time a few copies out and back, at start-up: device KV `slots` 1.. are free then. Leaves the pool as it was."""
    for tokens in (16, slots) * 3:
        if not 0 < tokens <= slots or pool.largest_room() < tokens:
            return
        where = torch.arange(1, tokens + 1, device=pool.device)
        copy = pool.save(where)
        if copy.ok:
            pool.load(copy, 0, where)
        pool.drop(copy)
    pool.wait()
