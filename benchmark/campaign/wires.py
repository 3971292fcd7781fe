"""Wires on every function of ours: they list what the scheduler calls, and raise where they are told to.

Nothing is named here: the modules of the package that are loaded are walked and each function, method and property
is wrapped. Left alone are the twin (it stands for the device), the clock, and methods that override one of SGLang's:
nothing of ours is above those, so what they call is what must not get through. An *entry* is a call from SGLang's
frames or the scheduler's own into another part of ours; all others are *inner* calls.
"""

from __future__ import annotations

import enum
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

PACKAGE = "sglang_slo"
LEFT_ALONE = ("twin", "clock", "config", "launch_server", "cli", "profile", "lang", "server", "cpu", "plugin")
HARNESS = ("campaign", "benchmark.campaign", f"{PACKAGE}.twin", "invariants", "__main__", "test_")
# says what SGLang does in the words of each release: to raise in there is to have SGLang raise half-way through its own
AS_SGLANG = f"{PACKAGE}.runtime.sglang"
LOOKS = 200  # calls of a function that are looked at, until one is an entry
SCHEDULER = f"{PACKAGE}.runtime.scheduler.scheduler"
# what catches, and so must not raise itself: each does nothing that is not guarded inside
GUARDS = {
    *(f"runtime.scheduler.scheduler.SloScheduler.{n}" for n in ("_report", "make_tick", "slo_fell_back")),
    *(f"runtime.scheduler.scheduler.SloScheduler.{n}" for n in ("_waiting", "_running")),
    *(
        f"runtime.scheduler.planning.Planning.{n}"
        for n in ("rejoin", "end", "prefill", "decode", "fall_back", "cached")
    ),
    *(f"runtime.ports.Trouble.{n}" for n in ("noting", "failed", "happened")),
    "runtime.requests.features.made_true",
    "runtime.scheduler.lifecycle.Lifecycle.results",
    *(f"runtime.report.loads.{n}" for n in ("waiting", "nobody_away", "Counted.waiting_queue")),
    "runtime.report.request_times.HearingSender.send_output",
    *(f"runtime.scheduler.news.{n}" for n in ("News.make", "without_ticks")),
}


class InjectedError(RuntimeError):
    """What a wire raises."""


@dataclass(frozen=True, order=True)
class Wire:
    """A function of ours that was called while the scheduler ran. `entry`: from SGLang's or the scheduler's frames."""

    name: str
    entry: bool


class Wires:
    """All wires of this process. One may be armed at a time; without it, calls pass at little cost."""

    def __init__(self) -> None:
        self.armed: str | None = None
        self.once = self.after = False
        self.fired = 0  # since it was armed
        self.tracing = False
        self._seen: dict[str, bool] = {}
        self._looked: Counter[str] = Counter()

    def arm(self, name: str, once: bool, after: bool) -> None:
        """Raise at the next call (`once`) or at every call of `name`; `after` what it does rather than before."""
        self.armed, self.once, self.after, self.fired = sys.intern(name), once, after, 0

    def disarm(self) -> None:
        """Let everything pass."""
        self.armed = None

    def seen(self) -> list[Wire]:
        """What was called while tracing."""
        return sorted(Wire(name, entry) for name, entry in self._seen.items())

    @contextmanager
    def strung(self) -> Iterator[None]:
        """While it is open, the functions of all modules of ours that are loaded are wrapped."""
        undo: list[tuple[Any, str, Any]] = []
        modules = [m for name, m in sorted(sys.modules.items()) if _ours(name) and m is not None]
        swapped: dict[int, Callable[..., Any]] = {}
        for module in modules:
            for owner, attribute, was, now in self._wrapped(module):
                undo.append((owner, attribute, was))
                setattr(owner, attribute, now)
                if owner is module:
                    swapped[id(was)] = now
        for module in modules:  # what was imported by name
            for attribute, value in list(vars(module).items()):
                if id(value) in swapped and isinstance(value, FunctionType):
                    undo.append((module, attribute, value))
                    setattr(module, attribute, swapped[id(value)])
        try:
            yield
        finally:
            self.disarm()
            for owner, attribute, was in reversed(undo):
                setattr(owner, attribute, was)

    def _wrapped(self, module: ModuleType) -> Iterator[tuple[Any, str, Any, Any]]:
        """(owner, attribute, what is there, its wrapped form) of everything that `module` defines."""
        place = module.__name__.removeprefix(PACKAGE + ".")
        for name, value in list(vars(module).items()):
            if getattr(value, "__module__", None) != module.__name__ or f"{place}.{name}" in GUARDS:
                continue
            if isinstance(value, FunctionType):
                yield module, name, value, self._wrap(f"{place}.{name}", value)
            elif isinstance(value, type) and not issubclass(value, (enum.Enum, BaseException)):
                yield from self._wrapped_class(value, f"{place}.{name}")

    def _wrapped_class(self, cls: type, place: str) -> Iterator[tuple[Any, str, Any, Any]]:
        stock = [b for b in cls.__mro__ if not b.__module__.startswith(PACKAGE)]
        for name, value in list(vars(cls).items()):
            if name.startswith("__") or any(hasattr(b, name) for b in stock):
                continue
            full = f"{place}.{name}"
            if full in GUARDS:
                continue
            if isinstance(value, FunctionType):
                guarded = _inside(value)  # a decorator that catches must see what is raised
                if guarded is None:
                    yield cls, name, value, self._wrap(full, value)
                else:
                    inner = guarded.cell_contents
                    yield guarded, "cell_contents", inner, self._wrap(full, inner)
            elif isinstance(value, (staticmethod, classmethod)):
                yield cls, name, value, type(value)(self._wrap(full, value.__func__))
            elif isinstance(value, property) and value.fget is not None:
                yield cls, name, value, property(self._wrap(full, value.fget), value.fset, value.fdel)

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        name = sys.intern(name)

        @functools.wraps(function)
        def wired(*args: Any, **kwargs: Any) -> Any:
            if self.armed is name and _caller(sys._getframe(1)) is not None:
                return self._trip(name, function, args, kwargs)
            if self.tracing and self._looked[name] < LOOKS:
                self._note(name, sys._getframe(1))
            return function(*args, **kwargs)

        return wired

    def _trip(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.fired += 1
        if self.once:
            self.armed = None
        if self.after:
            function(*args, **kwargs)
        raise InjectedError(f"injected {'after' if self.after else 'before'} {name}")

    def _note(self, name: str, frame: Any) -> None:
        entry = _caller(frame)
        self._looked[name] += LOOKS if entry else 1  # an entry is an entry
        if entry is not None:
            self._seen[name] = self._seen.get(name, False) or entry


def _inside(function: FunctionType) -> Any:
    """The closure cell that holds what a decorator wraps; None if there is no decorator."""
    inner = getattr(function, "__wrapped__", None)
    cells = function.__closure__ or ()
    return next((cell for cell in cells if inner is not None and cell.cell_contents is inner), None)


def _ours(module: str) -> bool:
    parts = module.split(".")
    mine = parts[0] == PACKAGE and len(parts) > 1 and parts[1] not in LEFT_ALONE
    return mine and not module.startswith(AS_SGLANG)


def _caller(frame: Any) -> bool | None:
    """Whether a call from `frame` is an entry; None if it is the harness that calls, not the scheduler."""
    entry: bool | None = None
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.endswith("campaign.wires"):
            if module.startswith(HARNESS):
                return None
            outside = not module.startswith(PACKAGE)
            entry = (outside or module == SCHEDULER) if entry is None else entry
            if module == SCHEDULER or module.startswith("sglang.srt"):
                return entry
        frame = frame.f_back
    return None
