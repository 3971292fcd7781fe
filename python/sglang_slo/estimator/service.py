"""Lengths for the scheduler: predicts at arrival, learns from what finishes, falls back and says so.

Lives in rank 0's scheduler process; the predictions travel in the tick. No call waits for a file, a process or a
lock. Levels, best first: the trained model, the one before it, quantiles of the request's class, of everybody, and the
declared maximum. Whatever goes wrong costs a level, never a request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sglang_slo.config import SloConfig
from sglang_slo.core.calibration import Calibration
from sglang_slo.core.lengths import MEDIAN, QUANTILES, Floats, declared_only
from sglang_slo.estimator import store
from sglang_slo.estimator.fallback import History
from sglang_slo.estimator.features import ArrivalFeatures, Rows, encode, rows_of
from sglang_slo.estimator.reservoir import Reservoir, load_snapshot
from sglang_slo.estimator.store import Saved, StoreError
from sglang_slo.estimator.stream import Vocabulary
from sglang_slo.estimator.trainer import ChildTrainer, InlineTrainer, Outcome
from sglang_slo.estimator.training import MIN_ROWS

log = logging.getLogger(__name__)
LEVELS = ("xgboost", "previous", "class quantiles", "global quantiles", "declared maximum")
XGBOOST, PREVIOUS, CLASS, EVERYBODY, DECLARED = LEVELS
GROWTH, MOST_BETWEEN = 2.0, 2048  # train when so many times as many finished, at the latest after so many
COUNTED = ("trained", "rejected", "training_failures", "errors", "store_errors")
LEAST_BETWEEN_S = 30.0  # between two rounds in a child process
DRIFT_BAND, DRIFT_LEAST = 0.08, 128  # coverage this far off P after so many new requests: train early
DRIFT_COLUMNS = [MEDIAN, 6]  # the levels 0.5 and 0.9 are watched

_UNCALIBRATED = -1


class LengthService:
    """Predicts output lengths. `trainer`: child (server) or inline (twin: synchronous, seeded).

    `store_dir` None: nothing is kept on disk (inline), or the config's `model_dir` (child; each data-parallel replica
    needs its own). `learn` False: the stored model is used as it is and never trained again.
    """

    def __init__(
        self,
        config: SloConfig,
        trainer: str = "child",
        store_dir: Path | str | None = None,
        seed: int = 0,
        vocabulary: Callable[[], Vocabulary] | Vocabulary | None = None,
        learn: bool = True,
    ) -> None:
        folder = store_dir if store_dir is not None else config.model_dir
        if trainer not in ("child", "inline"):
            raise ValueError(f"trainer: need child or inline, got {trainer!r}")
        if trainer == "child" and folder is None:
            raise ValueError("store_dir: a child trainer needs a folder")
        self.config, self.seed = config, seed
        self.folder = Path(folder) if folder is not None else None
        self.trainer = ChildTrainer(self.folder) if trainer == "child" and self.folder else InlineTrainer()
        self.learn = learn and config.length == "xgboost"
        self.vocabulary = vocabulary() if callable(vocabulary) else vocabulary
        self.history, self.reservoir = History(), Reservoir(seed=seed)
        self.calibration = Calibration()
        self._saved: Saved | None = None
        self._model_level = DECLARED
        self._source = 0
        self._pending: list[tuple[bytes, int]] = []
        self._copying = False
        self._finished = 0
        self._next_at = MIN_ROWS
        self._last_round: tuple[int, float] = (0, -np.inf)
        self._rounds = 0
        self.counters = dict.fromkeys(COUNTED, 0)
        self.predicted = dict.fromkeys(LEVELS, 0)
        self.last_error = ""
        if config.length == "xgboost" and self.folder is not None:
            self._restore(self.folder)

    # -- what the scheduler calls

    def predict(self, requests: Sequence[ArrivalFeatures]) -> Floats:
        """Calibrated log quantiles float64 [n, Q] on `core.lengths.QUANTILES`. Raises nothing.

        Keeps what `finished` will need in the requests and drops their text and ids.
        """
        if not requests:
            return np.zeros((0, len(QUANTILES)))
        try:
            return self._predict(requests)
        except Exception as error:  # a prediction is advice: without it the client's word is taken
            self._failed("errors", error)
            self.predicted[DECLARED] += len(requests)
            return declared_only(np.array([r.declared_max for r in requests]))

    def again(self, requests: Sequence[ArrivalFeatures]) -> Floats:
        """`predict` by what is known now, for requests that it was asked about before.

        Whoever is still there is likelier to be a long one: what becomes of them calibrates nothing.
        """
        try:
            if self.config.length == "none":
                return declared_only(np.array([r.declared_max for r in requests]))
            if self._saved is not None and self.config.length == "xgboost":
                return self._from_model(requests, rows_of(requests), self._saved)
            return self._without_model(requests)
        except Exception as error:
            self._failed("errors", error)
            return declared_only(np.array([r.declared_max for r in requests]))
        finally:
            for request in requests:
                request.source = _UNCALIBRATED

    @property
    def knowledge(self) -> tuple[int, int]:
        """Changes with every new model, and before the first one with every doubling of what has finished."""
        if self.config.length == "none":
            return 0, 0
        return self._source, 0 if self._saved is not None else self.history.doublings

    def finished(self, request: ArrivalFeatures, output_tokens: int) -> None:
        """Learn from a request that came to its end by itself or at its maximum; not from an aborted one."""
        try:
            self._finish(request, int(output_tokens))
        except Exception as error:
            self._failed("errors", error)

    def poll(self, now_s: float) -> None:
        """Take a new model over if one is ready, begin a round of learning if one is due. Returns at once (child)."""
        try:
            self._flush()
            outcome = self.trainer.collect()
            if outcome is not None:
                self._take(outcome)
            if self._due(now_s):
                self._begin(now_s)
                outcome = self.trainer.collect()
                if outcome is not None:
                    self._take(outcome)
        except Exception as error:
            self._failed("training_failures", error)

    def close(self) -> None:
        """Stop a child at work."""
        self.trainer.close()

    @property
    def level(self) -> str:
        """The best level there is now for a request of a class seen before, one of `LEVELS`."""
        if self.config.length == "none":
            return DECLARED
        if self._saved is not None:
            return self._model_level
        if self.history.global_quantiles() is None:
            return DECLARED
        return EVERYBODY if self.config.length == "mean" else CLASS

    def metrics(self) -> dict[str, float | int | str]:
        """Figures for status and Prometheus: level, rounds, failures, coverage at 0.5 and 0.9, what is kept."""
        coverage = self.calibration.coverage()
        return {
            "level": self.level,
            "level_number": LEVELS.index(self.level),
            "finished": self._finished,
            "kept_rows": len(self.reservoir),
            "model_rows": self._saved.model.rows if self._saved else 0,
            "coverage_50": float(coverage[MEDIAN]) if coverage is not None else -1.0,
            "coverage_90": float(coverage[6]) if coverage is not None else -1.0,
            "training": int(self.trainer.busy),
            **self.counters,
            **{f"predicted_{level.replace(' ', '_')}": n for level, n in self.predicted.items()},
            "last_error": self.last_error,
        }

    # -- predicting

    def _predict(self, requests: Sequence[ArrivalFeatures]) -> Floats:
        if self.config.length == "none":
            self.predicted[DECLARED] += len(requests)
            return declared_only(np.array([r.declared_max for r in requests]))
        if self.config.length == "xgboost":
            for request in requests:
                request.history = self.history.columns(request.slo_class, request.caller)
            rows = encode(requests, self.vocabulary)
            if self._saved is not None:
                try:
                    return self._from_model(requests, rows, self._saved)
                except Exception as error:
                    self._failed("errors", error)
        return self._without_model(requests)

    def _from_model(self, requests: Sequence[ArrivalFeatures], rows: Rows, saved: Saved) -> Floats:
        raw = saved.model.predict(rows)
        if not np.isfinite(raw).all():
            raise ValueError("the model's quantiles are not finite")
        self.predicted[self._model_level] += len(requests)
        return self._issue(requests, raw, self._source)

    def _without_model(self, requests: Sequence[ArrivalFeatures]) -> Floats:
        everybody = self.history.global_quantiles()
        if everybody is None:
            self.predicted[DECLARED] += len(requests)
            return declared_only(np.array([r.declared_max for r in requests]))
        if self.config.length == "mean":
            self.predicted[EVERYBODY] += len(requests)
            mean = self.history.mean_log_tokens() or 0.0
            return self._issue(requests, np.full((len(requests), len(QUANTILES)), mean), self._source)
        own = [self.history.class_quantiles(r.slo_class) for r in requests]
        known = sum(q is not None for q in own)
        self.predicted[CLASS] += known
        self.predicted[EVERYBODY] += len(requests) - known
        raw = np.array([everybody if q is None else q for q in own])
        return self._issue(requests, raw, self._source if self._saved is None else _UNCALIBRATED)

    def _issue(self, requests: Sequence[ArrivalFeatures], raw: Floats, source: int) -> Floats:
        issued = raw if source == _UNCALIBRATED else self.calibration.apply(raw, self.config.bound)
        for i, request in enumerate(requests):
            request.raw, request.issued, request.source = raw[i], issued[i], source
        return issued

    # -- learning

    def _finish(self, request: ArrivalFeatures, output_tokens: int) -> None:
        self._finished += 1
        if self.config.length == "none":
            return
        if request.source == self._source and request.raw is not None:
            self.calibration.add(request.raw, float(np.log(max(1, output_tokens))), request.issued)
        self.history.add(request.slo_class, request.caller, output_tokens)
        if self.learn:
            if request.row is None:
                encode([request], self.vocabulary)
            if request.row is not None:
                self._pending.append((request.row, output_tokens))
                self._flush()

    def _flush(self) -> None:
        if not self._copying:
            for row, output_tokens in self._pending:
                self.reservoir.add(row, output_tokens)
            self._pending.clear()

    def _due(self, now_s: float) -> bool:
        finished_then, then_s = self._last_round
        new = self.reservoir.seen - finished_then
        if not self.learn or self.trainer.busy or len(self.reservoir) < MIN_ROWS or new <= 0:
            return False
        if isinstance(self.trainer, ChildTrainer) and now_s - then_s < LEAST_BETWEEN_S:
            return False
        return self.reservoir.seen >= self._next_at or (new >= DRIFT_LEAST and self._drifted())

    def _drifted(self) -> bool:
        coverage = self.calibration.coverage()
        if coverage is None or self._saved is None:
            return False
        return bool((np.abs(coverage - QUANTILES)[DRIFT_COLUMNS] > DRIFT_BAND).any())

    def _begin(self, now_s: float) -> None:
        seen = self.reservoir.seen
        self._last_round = (seen, now_s)
        self._next_at = seen + int(min(max((GROWTH - 1) * seen, MIN_ROWS), MOST_BETWEEN))
        self._rounds += 1
        self._copying = isinstance(self.trainer, ChildTrainer)
        self.trainer.start(
            self._content, self._saved.model if self._saved else None, self.seed + self._rounds
        )

    def _content(self) -> np.ndarray:
        """What the reservoir holds; while a thread copies, what finishes waits in `_pending`."""
        try:
            return self.reservoir.content()
        finally:
            self._copying = False

    def _take(self, outcome: Outcome) -> None:
        self._copying = False
        if outcome.error:
            self._failed("training_failures", outcome.error)
        elif outcome.saved is None:
            self.counters["rejected"] += 1
        else:
            self.counters["trained"] += 1
            self._use(outcome.saved, XGBOOST)

    def _use(self, saved: Saved, level: str) -> None:
        """Swap a model in: from the next call on it answers, with the calibration it was measured with."""
        calibration = Calibration()
        calibration.seed(saved.raw, saved.logs)
        self._saved, self.calibration, self._model_level = saved, calibration, level
        self._source += 1

    def _restore(self, folder: Path) -> None:
        """Take up the stored model, else the one before; and the finished requests."""
        store.sweep(folder)
        for name, level in ((store.CURRENT, XGBOOST), (store.PREVIOUS, PREVIOUS)):
            try:
                self._use(store.load(folder / name), level)
                break
            except (StoreError, ValueError, IndexError) as error:
                if (folder / name).exists():
                    self._failed("store_errors", error)
        try:
            self.reservoir.restore(load_snapshot(folder / store.SNAPSHOT))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self._failed("store_errors", error)
        if self._saved is not None:
            self._last_round = (self.reservoir.seen, -np.inf)
            self._next_at = self.reservoir.seen + MIN_ROWS

    def _failed(self, counter: str, error: Exception | str) -> None:
        self.counters[counter] += 1
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        if text != self.last_error:
            log.warning("output lengths: %s (now: %s)", text, self.level)
        self.last_error = text
