"""Keeps the latency model true while serving: takes in measured iterations, and every so often fits them.

Runs on the rank whose tick is broadcast; the others get the result in the tick, so all plan with the same
model. The fit starts from the profile each time, never from the last fit: what traffic never shows stays as
profiled, but for how much faster or slower the device is in all, and errors cannot build up. A refit that changes
next to nothing is not put into force. One that finds the device faster than thought lets budgets grow by
`MOST_GROWTH` at a time: what a batch larger than any so far takes, the samples do not say yet.

Budgets are planned with a high quantile of measured/predicted, one for iterations with prefill and one for
decodes alone. Its level trades gaps for first tokens: a lower one misses the gaps of noisy iterations, a higher
one leaves too little of a tight limit for prefill. Wherever limits leave room 0.995 keeps nearly all gaps.

With that level one iteration in 200 takes longer than planned. `SURPRISES` of `AMONG` say that the device is not what it
was: a neighbour has come, or its clock went down. Then the model is fitted at once, and judged by these alone.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np

from sglang_slo.core.fit import fit, margins, predict_s
from sglang_slo.core.latency import Coefficients, LatencyModel
from sglang_slo.core.samples import Samples, SampleWindow
from sglang_slo.runtime.latency.iteration_log import IterationLog

if TYPE_CHECKING:
    from sglang_slo.runtime.requests.registry import Launch

logger = logging.getLogger(__name__)

FIRST_REFIT = 8  # iterations: a profile of another model costs every gap until then
REFIT_EVERY = 256  # iterations, once there have been as many; before, with every doubling
AFTER_FAILURE = 16_384  # iterations until the next try
LEVEL = 0.995  # the quantile of measured/predicted that budgets are planned with
SURPRISES, AMONG = 3, 32  # by chance once in 17,000 iterations at `LEVEL`: p (31 over 2) p^2, p = 1 - LEVEL
IDLE_WEIGHT = 0.1  # of an iteration that found the device idle: its time includes the scheduler's own
MOST_GROWTH = (
    1.25  # of the time that a refit may take off the safe prediction of any sample, at once, as a factor
)
LEAST_CHANGE = 0.01  # of predictions or of the margin, relative, for a refit to come into force
LONGEST_S = 60.0  # what takes longer was no iteration (a suspended process)


class OnlineFit:
    """The samples of one server, and the model fitted to them last.

    `overlap`: iterations are launched while the one before runs, so that one which finds the device idle is
    not like the others. `log`: whether this rank writes the log of iterations, if one is asked for.
    """

    def __init__(self, start: LatencyModel, overlap: bool = True, log: bool = True) -> None:
        self.start = self.model = start
        self.window = SampleWindow()
        self.refits = 0  # that came into force
        self.drift = 1.0
        self._overlap = overlap
        self._log = IterationLog(log)
        self._next = FIRST_REFIT
        self._rests_until = 0  # after a failure
        self._since = 0  # samples before the device changed last
        self._late: deque[bool] = deque(maxlen=AMONG)  # whether each took longer than planned, since then

    def add(self, launch: Launch) -> None:
        """Take in an iteration whose end has been measured."""
        seconds = launch.duration_s
        if seconds is None or not 0 < seconds < LONGEST_S or launch.shape.new_tokens <= 0:
            return
        self._log.add(launch)
        if launch.shape.load_s > 0:  # its time may be that of the link to the host
            return
        idle = self._overlap and launch.idle_s > 0
        self.window.add(launch.shape, seconds, IDLE_WEIGHT if idle else 1.0)
        if not idle:
            # what is less than a refit would change is no surprise: on a model that is exact all would be
            planned_s = self.model.safe_iteration_s(launch.shape)
            self._late.append(seconds > planned_s * (1 + LEAST_CHANGE))
            if len(self._late) >= FIRST_REFIT and sum(self._late) >= SURPRISES:
                self._changed()

    def _changed(self) -> None:
        """The device is not what it was: the next refit is now, and the following ones come soon again."""
        self.window.forget(keep=len(self._late))
        self._since = self.window.added - len(self._late)
        self._late.clear()
        self._next = self.window.added

    def maybe_refit(self) -> LatencyModel | None:
        """The model as refitted now; None if it is not time yet, or if the one in force is as good."""
        if self.window.added < max(self._next, self._rests_until):
            return None
        self._next = self.window.added + min(self.window.added - self._since, REFIT_EVERY)
        try:
            return self._refit()
        except Exception:
            logger.exception("sglang-slo: the latency model could not be refitted; the one in force stays")
            self._rests_until = self.window.added + AFTER_FAILURE
            return None

    def _refit(self) -> LatencyModel | None:
        recent = self.window.recent()
        if len(recent) < FIRST_REFIT:
            return None
        diverse = self.window.diverse()
        self.drift = float(np.median(recent.seconds / predict_s(self.start.coefficients, recent)))
        coefficients = fit(diverse, self.start.scaled(self.drift).coefficients)
        predicted, before = predict_s(coefficients, recent), predict_s(self.model.coefficients, recent)
        extend, decode = self._gently(diverse, coefficients, *margins(recent, predicted, LEVEL))
        change = float(np.mean(np.abs(predicted / before - 1)))
        wider = (abs(extend / self.model.margin_extend - 1), abs(decode / self.model.margin_decode - 1))
        if max(change, *wider) < LEAST_CHANGE:
            return None
        self.refits += 1
        self.model = replace(
            self.model, coefficients=coefficients, margin_extend=extend, margin_decode=decode
        )
        return self.model

    def _gently(
        self, samples: Samples, coefficients: Coefficients, extend: float, decode: float
    ) -> tuple[float, float]:
        """The margins, widened until no sample's safe prediction falls by more than `MOST_GROWTH`; then soon again."""
        faster = predict_s(self.model.coefficients, samples) / predict_s(coefficients, samples)
        least = [
            margin * float(faster[kind].max(initial=0.0)) / MOST_GROWTH
            for margin, kind in (
                (self.model.margin_extend, samples.extend),
                (self.model.margin_decode, ~samples.extend),
            )
        ]
        if least[0] > extend or least[1] > decode:
            self._next = self.window.added + FIRST_REFIT
        return max(extend, least[0]), max(decode, least[1])

    def metrics(self) -> dict[str, float]:
        """What is shown of the model: coefficients (s), the margins in force, drift, samples and refits.

        `drift`: median of measured / predicted by the profile the server started with; 1 is as profiled.
        """
        return {
            **asdict(self.model.coefficients),
            "margin_extend": self.model.margin_extend,
            "margin_decode": self.model.margin_decode,
            "drift": self.drift,
            "samples": len(self.window),
            "refits": self.refits,
        }
