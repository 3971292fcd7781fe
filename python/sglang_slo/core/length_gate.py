"""Whether predicted lengths are worth deciding by: only while they beat what is known without looking at a request.

Each finished request is scored twice, by the pinball loss over the quantile levels (Koenker and Bassett, 1978): with
the log quantiles that were predicted when it arrived, and with those of the last lengths that finished before it (the
marginal). Predictions are trusted while their mean loss over the last requests is `ADVANTAGE` below the marginal's.
Where lengths do not depend on the request they never are: a wrong order of victims would be worse than none.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from sglang_slo.core.lengths import QUANTILES, Floats

LATEST = 512  # lengths that the marginal is made of
SCORED = 256  # requests whose losses are compared
LEAST = 64  # scored requests before anything is trusted
ADVANTAGE = 0.1  # share of the marginal's loss that predictions must save
REFRESH = 16  # finished requests between two looks at the marginal


def pinball(log_quantiles: Floats, log_length: float) -> float:
    """Mean pinball loss of log quantiles [Q] at one log length: 0 for a certain and right prediction."""
    error = log_length - log_quantiles
    return float(np.maximum(QUANTILES * error, (QUANTILES - 1) * error).mean())


class LengthGate:
    """Keeps the score of one server's predictor. Memory is fixed: LATEST lengths and SCORED pairs of losses."""

    def __init__(self) -> None:
        self._lengths: deque[float] = deque(maxlen=LATEST)
        self._losses: deque[tuple[float, float]] = deque(maxlen=SCORED)
        self._marginal: Floats | None = None
        self._since = 0
        self.saved = (
            0.0  # share of the marginal's loss that predictions saved lately; negative: they were worse
        )

    def finished(self, predicted_log_quantiles: Floats, output_tokens: int) -> None:
        """Score one request that came to its own end."""
        log_length = float(np.log(max(output_tokens, 1)))
        if self._marginal is not None:
            predicted = np.asarray(predicted_log_quantiles, np.float64)
            self._losses.append((pinball(predicted, log_length), pinball(self._marginal, log_length)))
            self.saved = self._score()
        self._lengths.append(log_length)
        self._since += 1
        if self._since >= REFRESH:
            self._since = 0
            self._marginal = np.quantile(np.array(self._lengths), QUANTILES)

    def _score(self) -> float:
        if len(self._losses) < LEAST:
            return 0.0
        own, marginal = np.array(self._losses).mean(axis=0)
        return float(1 - own / marginal) if marginal > 0 else 0.0

    @property
    def trusted(self) -> bool:
        """Whether decisions may go by predicted lengths."""
        return self.saved >= ADVANTAGE
