"""Faults that can befall one virtual scheduler, each switched on for a while: exceptions, lies, failures, slowness.

A fault is a name and a way to switch it on that returns the way to switch it off. They act where our code meets the
world: the clock it reads, the device's time, what rank 0 sends round, the host pool, the predictor, SGLang's allocator.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

from campaign.wires import PACKAGE, Wire, Wires
from sglang_slo import clock

Off = Callable[[], None]
ABSURD = (0.0, math.nan, 1e9, -1.0, math.inf)


@dataclass(frozen=True)
class Fault:
    """`on(target)` switches it on. `once`: it strikes one time. `fair`: requests must be served while it lasts."""

    name: str
    on: Callable[[Target], Off]
    once: bool = False


@dataclass
class Target:
    """What a fault may touch."""

    scheduler: Any
    engine: Any
    wires: Wires
    rng: random.Random


def wire_faults(wires: list[Wire]) -> list[Fault]:
    """An exception in each of our functions: before and after what it does, once and always."""
    return [_wire(wire, once, after) for wire in wires for after in (False, True) for once in (True, False)]


def _wire(wire: Wire, once: bool, after: bool) -> Fault:
    def on(target: Target) -> Off:
        target.wires.arm(wire.name, once, after)
        return target.wires.disarm

    kind = "entry" if wire.entry else "inner"
    when = f"{'once' if once else 'always'} {'after' if after else 'before'}"
    return Fault(f"raise {when} {kind} {wire.name}", on, once)


# -- time


def _clock(wrong: Callable[[float], float]) -> Callable[[Target], Off]:
    def on(target: Target) -> Off:
        began_s, right = target.engine.now_s, target.engine.now
        clock.use(lambda: wrong(right() - began_s) + began_s)
        return lambda: clock.use(right)

    return on


def _slow(factor: float) -> Callable[[Target], Off]:
    """Passes of the device take so many times as long as they should."""

    def on(target: Target) -> Off:
        engine, launch = target.engine, target.engine.launch

        def slow(shape: Any) -> tuple[float, float]:
            start, end = launch(shape)
            engine.busy_until_s = start + (end - start) * factor
            return start, engine.busy_until_s

        engine.launch = slow
        return lambda: vars(engine).pop("launch", None) and None

    return on


# -- what was measured and predicted


def _news(change: Callable[[Any, random.Random], dict[str, Any]]) -> Callable[[Target], Off]:
    """Rank 0's news with other values in it; `change` names the fields."""

    def on(target: Target) -> Off:
        s, make = target.scheduler, target.scheduler.make_tick

        def lying(requests: list[Any]) -> Any:
            tick = make(requests)
            known = {f.name for f in dataclasses.fields(tick)}
            changes = {k: v for k, v in change(tick, target.rng).items() if k in known}
            return dataclasses.replace(tick, **changes)

        old = s.request_receiver
        s.request_receiver = dataclasses.replace(old, make_tick=lying)

        def off() -> None:
            s.request_receiver = old

        return off

    return on


def _ends(tick: Any, rng: random.Random) -> dict[str, Any]:
    """Passes that ended at any time but the right one, some twice, some of the future."""
    wrong = [(i, rng.choice([*ABSURD, end - 5.0, end + 5.0])) for i, end in getattr(tick, "ended", [])]
    extra = [(wrong[0][0] + rng.choice([0, 1, 1000]), 0.0)] if wrong and rng.random() < 0.3 else []
    return {"ended": wrong + extra}


def _lengths(tick: Any, rng: random.Random) -> dict[str, Any]:
    """Predictions that are no numbers, huge, or not monotone."""
    said = {
        rid: [rng.choice([*ABSURD, 50.0]) for _ in levels]
        for rid, levels in getattr(tick, "log_quantiles", {}).items()
    }
    return {"log_quantiles": said, "confidence": rng.choice([math.nan, 0.0, 2.0, -1.0])}


def _prices(_: Any, rng: random.Random) -> dict[str, Any]:
    return {"swap": (rng.choice(ABSURD), rng.choice(ABSURD))}


def _predictor(answer: Callable[[int], Any]) -> Callable[[Target], Off]:
    """The service behind the predictor answers otherwise, or not at all."""

    def on(target: Target) -> Off:
        service = target.scheduler.slo_lengths.service
        before = {name: getattr(service, name) for name in ("predict", "again")}
        for name in before:
            setattr(service, name, lambda requests: answer(len(requests)))

        def off() -> None:
            for name, method in before.items():
                setattr(service, name, method)

        return off

    return on


def _dead(_: int) -> Any:
    raise ConnectionError("injected: the predictor is dead")


def _wrong_shape(_: int) -> Any:
    import numpy as np

    return np.full((1, 2), np.nan)


# -- copies and memory


def _pool(**methods: Callable[..., Any]) -> Callable[[Target], Off]:
    """Methods of the host pool replaced; nothing if there is no pool. Each gets the pool's own method first."""

    def on(target: Target) -> Off:
        line = getattr(target.scheduler.slo_preempt, "line", None)
        if line is None:
            return lambda: None
        pool = line.pool
        for name, method in methods.items():
            real = getattr(pool, name)
            setattr(pool, name, lambda *a, _m=method, _r=real, **k: _m(_r, *a, **k))

        def off() -> None:
            for name in methods:
                vars(pool).pop(name, None)

        return off

    return on


def _fails(_: Callable[..., Any], *__: Any) -> Any:
    raise RuntimeError("injected: the copy failed")


def _no_memory(_: Callable[..., Any], *__: Any) -> Any:
    raise MemoryError("injected: no host memory")


def _unusable(save: Callable[..., Any], *args: Any) -> Any:
    copy = save(*args)
    copy.ok = False
    return copy


def _full(target: Target) -> Off:
    """The host pool has room for nothing more."""
    line = getattr(target.scheduler.slo_preempt, "line", None)
    if line is None:
        return lambda: None
    pool = line.pool
    pool.largest_room = lambda: 0
    return lambda: vars(pool).pop("largest_room", None) and None


def _absurd_meter(target: Target) -> Off:
    """Copies that took no time, for ever, or less than none."""
    line = getattr(target.scheduler.slo_preempt, "line", None)
    if line is None:
        return lambda: None
    meter, saw = line.pool.meter, line.pool.meter.saw
    meter.saw = lambda n, seconds: saw(n, target.rng.choice(ABSURD))
    return lambda: vars(meter).pop("saw", None) and None


def _allocator(target: Target) -> Off:
    """SGLang's allocator, as our modules know it, says that there is nothing left."""

    def none(*_: Any, **__: Any) -> Any:
        raise RuntimeError("injected: out of memory")

    patches = [
        mock.patch.object(module, name, none)
        for module_name, module in list(sys.modules.items())
        if module_name.startswith(PACKAGE + ".runtime")
        for name, value in list(vars(module).items())
        if name.startswith("alloc") and getattr(value, "__module__", "").startswith("sglang.")
    ]
    for patch in patches:
        patch.start()

    def off() -> None:
        for patch in patches:
            patch.stop()

    return off


WORLD_FAULTS = (
    Fault("clock: nan", _clock(lambda t: math.nan)),
    Fault("clock: stands still", _clock(lambda t: 0.0)),
    Fault("clock: 10 s back", _clock(lambda t: t - 10.0)),
    Fault("clock: 1e6 s back", _clock(lambda t: t - 1e6)),
    Fault("clock: 1 h ahead", _clock(lambda t: t + 3600.0)),
    Fault("clock: 1e9 s ahead", _clock(lambda t: t + 1e9)),
    Fault("clock: jumps to and fro", _clock(lambda t: t + (3.0 if int(t * 1e3) % 2 else -3.0))),
    Fault("device: passes take a thousand times as long", _slow(1e3)),
    Fault("device: passes take no time", _slow(0.0)),
    Fault("measured: absurd ends", _news(_ends)),
    Fault("measured: absurd swap prices", _news(_prices)),
    Fault("measured: absurd copies", _absurd_meter),
    Fault("predicted: absurd lengths", _news(_lengths)),
    Fault("predictor: dead", _predictor(_dead)),
    Fault("predictor: wrong shape", _predictor(_wrong_shape)),
    Fault("host: copying out fails", _pool(save=_fails)),
    Fault("host: no memory though there was room", _pool(save=_no_memory)),
    Fault("host: copies cannot be used", _pool(save=_unusable)),
    Fault("host: copying back fails", _pool(load=_fails)),
    Fault("host: fences fail", _pool(fence=_fails)),
    Fault("host: no room", _full),
    Fault("memory: our allocations fail", _allocator),
)
