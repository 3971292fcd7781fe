"""Predictors of output lengths for the twin, all with the interface of `estimator.service.LengthService`.

xgboost, mean, none: the service itself, learning in line from what has finished. oracle and noisy know the hidden
lengths: the twin hands them over and nobody else may. shifted: a model file trained on another workload, never
trained again; only its calibration goes on, as it would in a server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy.special import ndtri

from sglang_slo.config import SloConfig
from sglang_slo.core.lengths import QUANTILES, Floats
from sglang_slo.estimator.features import ArrivalFeatures, name_hash
from sglang_slo.estimator.service import LengthService

PREDICTORS = ("xgboost", "mean", "none", "oracle", "noisy", "shifted")


class Predictor(Protocol):
    """What the scheduler asks of a predictor."""

    def predict(self, requests: Sequence[ArrivalFeatures]) -> Floats: ...
    def finished(self, request: ArrivalFeatures, output_tokens: int) -> None: ...
    def again(self, requests: Sequence[ArrivalFeatures]) -> Floats: ...
    @property
    def knowledge(self) -> tuple[int, int]: ...
    def poll(self, now_s: float) -> None: ...
    def close(self) -> None: ...
    @property
    def level(self) -> str: ...
    def metrics(self) -> dict[str, float | int | str]: ...


class Knowing:
    """Knows the hidden lengths, blurred by a log-normal error of `sigma` (0: the oracle). Seeded per request.

    What it says is honest: given its blurred guess, the length is log-normal around it with the same sigma.
    """

    def __init__(self, hidden_tokens: Mapping[str, int], sigma: float = 0.0, seed: int = 0) -> None:
        if not 0 <= sigma < 5:
            raise ValueError(f"sigma: need a number in [0, 5), got {sigma}")
        self._hidden, self.sigma, self.seed = hidden_tokens, sigma, seed
        self._spread = sigma * ndtri(QUANTILES)

    def predict(self, requests: Sequence[ArrivalFeatures]) -> Floats:
        """Log quantiles [n, Q]. Raises KeyError for a request id it was not told about."""
        true = np.log([max(1, self._hidden[r.rid]) for r in requests])
        error = np.array([np.random.default_rng([self.seed, name_hash(r.rid)]).normal() for r in requests])
        return np.maximum((true + self.sigma * error)[:, None] + self._spread, 0.0)

    def finished(self, request: ArrivalFeatures, output_tokens: int) -> None:
        """Nothing to learn."""

    def again(self, requests: Sequence[ArrivalFeatures]) -> Floats:
        """As before: there is nothing to learn."""
        return self.predict(requests)

    @property
    def knowledge(self) -> tuple[int, int]:
        """Never changes."""
        return 0, 0

    def poll(self, now_s: float) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to stop."""

    @property
    def level(self) -> str:
        """oracle or noisy."""
        return "noisy" if self.sigma else "oracle"

    def metrics(self) -> dict[str, float | int | str]:
        """The level alone."""
        return {"level": self.level}


def make(
    name: str,
    config: SloConfig,
    hidden_tokens: Mapping[str, int],
    seed: int = 0,
    sigma: float = 0.6,
    shifted_model: Path | None = None,
) -> Predictor:
    """The predictor a workload names. `hidden_tokens`: request id to true length, read by oracle and noisy only.

    Raises ValueError for an unknown name, or shifted without the folder of a model.
    """
    if name in ("xgboost", "mean", "none"):
        return LengthService(replace(config, length=name, model_dir=None), trainer="inline", seed=seed)
    if name in ("oracle", "noisy"):
        return Knowing(hidden_tokens, sigma if name == "noisy" else 0.0, seed)
    if name == "shifted":
        if shifted_model is None:
            raise ValueError("shifted: need the folder of a model trained on another workload")
        chosen = replace(config, length="xgboost")
        return LengthService(chosen, trainer="inline", store_dir=shifted_model, seed=seed, learn=False)
    raise ValueError(f"predictor: need one of {', '.join(PREDICTORS)}, got {name!r}")
