"""SGLang's hierarchical cache in virtual time: its own tree and host pool, and a link to the host busy while KV moves.

The twin's KV is empty, so nothing is copied. Copies out and back go one after another beside the engine's passes; a pass
that loads ends when its load does, at the earliest. SGLang sees a copy's end by its event, which knows the engine's clock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from sglang_slo.cpu import hierarchical as on_cpu
from sglang_slo.twin.sim.engine import VirtualEngine

# SGLang's modules that name the device's streams and events
MODULES = ("sglang.srt.managers.cache_controller", "sglang.srt.mem_cache.l2_transfer")


class _Link:
    """The link to the host: when what was sent over it last has arrived."""

    def __init__(self, engine: VirtualEngine) -> None:
        self.engine, self.free_s, self.loaded_tokens = engine, 0.0, 0

    def save(
        self, host_pool: Any, device_pool: Any, host: torch.Tensor, device: torch.Tensor, backend: str
    ) -> None:
        """In the place of a copy to the host."""
        self._move(len(host))

    def load(
        self,
        host_pool: Any,
        device_pool: Any,
        host: torch.Tensor,
        device: torch.Tensor,
        layer: int,
        backend: str,
        **_: Any,
    ) -> None:
        """In the place of a copy of one layer to the device; the twin's model has one."""
        self._move(len(host))
        self.engine.ends_after(self.free_s)

    def _move(self, tokens: int) -> None:
        device = self.engine.device
        seconds = device.swap_overhead_s + tokens * device.kv_bytes_per_token / device.swap_bytes_per_s
        self.free_s = max(self.free_s, self.engine.now_s) + seconds


class _Event:
    """An event on the link's stream."""

    def __init__(self, link: _Link, **_: Any) -> None:
        self._link, self._at_s = link, 0.0

    def record(self, stream: Any = None) -> None:
        self._at_s = self._link.free_s

    def query(self) -> bool:
        return self._link.engine.now_s >= self._at_s

    def synchronize(self) -> None:
        self._link.engine.wait_until(self._at_s)

    def wait(self, stream: Any = None) -> None:
        """Whatever comes next on the stream is later anyway."""

    def elapsed_time(self, other: _Event) -> float:
        return (other._at_s - self._at_s) * 1e3


class _Stream:
    """A stream on which nothing runs."""

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def hierarchical(engine: VirtualEngine) -> Iterator[None]:
    """While it is open, SGLang's host pools copy over a virtual link of `engine`'s device."""
    link = _Link(engine)
    device_module = SimpleNamespace(
        Event=partial(_Event, link),
        Stream=_Stream,
        stream=lambda stream: contextlib.nullcontext(),
        current_stream=_Stream,
        __name__="virtual",
    )
    with contextlib.ExitStack() as patches:
        for name in MODULES:
            if find_spec(name) is not None:
                patches.enter_context(mock.patch.object(import_module(name), "device_module", device_module))
        patches.enter_context(mock.patch.object(on_cpu, "load", link.load))
        patches.enter_context(mock.patch.object(on_cpu, "save", link.save))
        yield
