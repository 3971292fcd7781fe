"""Typical lengths of models and classes, shrunk towards everybody's where little was seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_slo.estimator.features import Rows

SHRINK = 20.0  # rows of everybody's that a group's own typical length is mixed with
MAX_NAMES = 256

Floats = NDArray[np.floating]


@dataclass
class Typical:
    """Log medians and spreads (0.1 to 0.9 quantile). `*_names` [k] sorted hashes; `*_values` [k + 1, 2], last: unknown."""

    group_names: NDArray[np.uint64]
    group_values: Floats
    class_names: NDArray[np.uint64]
    class_values: Floats

    @staticmethod
    def fit(rows: Rows, logs: Floats) -> Typical:
        """From rows [n] and natural logs of their lengths [n]."""
        return Typical(*_table(rows["group"], logs), *_table(rows["slo_class"], logs))

    def group_median(self, group: NDArray[np.uint64]) -> Floats:
        """Log of the typical length [n] of each row's model."""
        return np.asarray(self.group_values[_find(self.group_names, group), 0])

    def columns(self, rows: Rows) -> Floats:
        """Columns [n, 4]: median and spread of the row's model and of its class."""
        group = self.group_values[_find(self.group_names, rows["group"])]
        return np.concatenate([group, self.class_values[_find(self.class_names, rows["slo_class"])]], axis=1)


def _table(names: NDArray[np.uint64], logs: Floats) -> tuple[NDArray[np.uint64], Floats]:
    known, counts = np.unique(names, return_counts=True)
    known = np.sort(known[np.argsort(-counts, kind="stable")[:MAX_NAMES]])
    everybody = _shape(logs)
    values = [_mixed(logs[names == name], everybody) for name in known]
    return known, np.array([*values, everybody])


def _mixed(logs: Floats, everybody: Floats) -> Floats:
    share = len(logs) / (len(logs) + SHRINK)
    return np.asarray(share * _shape(logs) + (1 - share) * everybody)


def _shape(logs: Floats) -> Floats:
    low, middle, high = np.quantile(logs, [0.1, 0.5, 0.9])
    return np.array([middle, high - low])


def _find(known: NDArray[np.uint64], names: NDArray[np.uint64]) -> NDArray[np.intp]:
    at = np.minimum(np.searchsorted(known, names), len(known) - 1)
    return np.asarray(np.where(known[at] == names, at, len(known)))
