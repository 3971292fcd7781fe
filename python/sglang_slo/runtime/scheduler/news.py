"""Ticks made and taken: what rank 0 measured and predicted since the last one, and what each rank does with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglang.srt.managers import io_struct

from sglang_slo import clock
from sglang_slo.runtime.ports import Tick

if TYPE_CHECKING:
    from sglang_slo.runtime.kv.preempt import Preemptor
    from sglang_slo.runtime.latency.online_fit import OnlineFit
    from sglang_slo.runtime.ports import Ports
    from sglang_slo.runtime.requests.lengths import ArrivingLengths

WEIGHTS_CHANGE = (
    io_struct.UpdateWeightFromDiskReqInput,
    io_struct.UpdateWeightsFromDistributedReqInput,
    io_struct.UpdateWeightsFromTensorReqInput,
    io_struct.UpdateWeightsFromIPCReqInput,
)
LENGTHS_EVERY = 16  # iterations without arrivals between looks at the load and at how learning goes
MOST_ENDED = 1024  # measured ends of iterations that wait for a tick


class News:
    """One rank's news. `ended`: (iteration, when its results were out), taken by the next tick.

    Only the rank that broadcasts makes ticks: on the others the oldest ends fall out.
    """

    def __init__(
        self,
        ports: Ports,
        fit: OnlineFit,
        preempt: Preemptor,
        lengths: Callable[[], ArrivingLengths | None],
    ) -> None:
        self._ports, self._fit, self._preempt, self._lengths = ports, fit, preempt, lengths
        self.ended: deque[tuple[int, float]] = deque(maxlen=MOST_ENDED)

    def make(self, requests: list[Any]) -> Tick:
        """What this rank measured since the last tick; called on the rank whose requests are broadcast."""
        try:
            return self._make(requests)
        except Exception as error:
            self._ports.trouble.failed("a tick", error)
            return Tick(clock.now(), confidence=self._ports.agreed.tick.confidence)

    def _make(self, requests: list[Any]) -> Tick:
        p, now, line = self._ports, clock.now(), self._preempt.line
        ended = list(self.ended)
        self.ended.clear()
        lengths, quantiles, revised = self._lengths(), {}, {}
        confidence = p.agreed.tick.confidence
        if lengths is not None and (requests or p.batches.iteration_number % LENGTHS_EVERY == 0):
            try:
                quantiles = lengths.predict(requests)
                confidence = lengths.confidence(now, len(quantiles), len(p.waiting.reqs))
                revised = lengths.revised()
            except Exception as error:
                p.trouble.failed("lengths", error)
        return Tick(
            now,
            ended,
            self._fit.maybe_refit(),
            quantiles | revised,
            bool(revised),
            confidence,
            self._preempt.cost.measured(),
            vote=line is not None and line.votes(),
            lengths_trusted=lengths is not None and lengths.gate.trusted,
        )

    def take(self, tick: Tick) -> None:
        """From now on this is what all ranks plan with."""
        p = self._ports
        p.agreed.tick = tick
        if tick.vote and self._preempt.line is not None:
            self._preempt.line.vote()
        for iteration, end_s in tick.ended:
            launch = p.requests.ended(iteration, end_s)
            if launch is not None:
                self._fit.add(launch)
        if tick.revised:
            for row, req in p.requests.reqs.items():
                if req.rid in tick.log_quantiles:
                    p.requests.predicted(row, tick.log_quantiles[req.rid], tick.confidence)
        if tick.model is not None or tick.swap is not None:
            p.agreed.model = self._preempt.cost.priced(tick.model or p.agreed.model, tick.swap)


def without_ticks(received: list[Any]) -> list[Any]:
    """What SGLang knows of what was received."""
    return [r for r in received if not isinstance(r, Tick)]


def in_one(received: list[Any]) -> Tick | None:
    """All ticks of what was received, oldest first, as one: the last, with nothing lost of the others; None without any.

    There are several where SGLang held messages back.
    """
    ticks = [r for r in received if isinstance(r, Tick)]
    one = ticks[0] if ticks else None
    for tick in ticks[1:]:
        assert one is not None
        one = replace(
            tick,
            ended=[*one.ended, *tick.ended],
            model=tick.model or one.model,
            log_quantiles=one.log_quantiles | tick.log_quantiles,
            revised=one.revised or tick.revised,
            swap=tick.swap or one.swap,
            vote=one.vote or tick.vote,
        )
    return one
