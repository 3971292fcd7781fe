"""The text head: a ridge regression on hashed n-grams, whose answer the trees see as one more column.

Trees are poor at adding up many weak words, a linear model is good at it. The target is sqrt(length / typical length of
the model): its mean lies near the median of skewed lengths. Trees must not see answers that the head learnt by heart,
so training rows get leave-one-prompt-out predictions, which the dual form gives in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from sglang_slo.estimator.features import DENSE, EMPTY, HASH_BINS, Rows

MAX_PROMPTS = 1500  # newest prompts that take part: the solve is cubic in them
MIN_GROUP = 100  # prompts a model must have answered to get a head of its own
MAX_GROUPS = 32
ALPHAS = (0.5, 1.0, 2.0, 4.0)
DENSE_WEIGHT = 0.1  # of a standardised dense column beside a unit-length vector of n-grams

Floats = NDArray[np.float64]


@dataclass
class TextHead:
    """Weights of the ridge. `weights` [1 + G, HASH_BINS + DENSE] of everybody's head and of each group's own,
    `intercepts` [1 + G], `groups` [G] sorted name hashes, `idf` [HASH_BINS], `mean` and `scale` [DENSE]."""

    weights: Floats
    intercepts: Floats
    groups: NDArray[np.uint64]
    idf: Floats
    mean: Floats
    scale: Floats

    def predict(self, rows: Rows) -> Floats:
        """Columns [n, 2]: everybody's head, and the row's group's own (everybody's where it has none)."""
        answers = _design(rows, self.idf, self.mean, self.scale) @ self.weights.T + self.intercepts
        own = _own_column(rows["group"], self.groups)
        return np.stack([answers[:, 0], answers[np.arange(len(rows)), own]], axis=1)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """What a model file stores."""
        return {f"head_{name}": getattr(self, name) for name in _FIELDS}

    @staticmethod
    def from_arrays(arrays: dict[str, NDArray[np.generic]]) -> TextHead:
        """Inverse of `arrays`. Raises KeyError or ValueError on a wrong shape."""
        head = TextHead(*(np.asarray(arrays[f"head_{name}"]) for name in _FIELDS))  # type: ignore[arg-type]
        if head.weights.shape != (1 + len(head.groups), HASH_BINS + DENSE):
            raise ValueError(f"head_weights: need {(1 + len(head.groups), HASH_BINS + DENSE)}")
        return head


_FIELDS = ("weights", "intercepts", "groups", "idf", "mean", "scale")


def fit(rows: Rows, ratio: Floats) -> tuple[TextHead, Floats]:
    """Head for `rows` [n] with `ratio` [n] = length / typical length, and its leave-one-prompt-out columns [n, 2]."""
    first, prompt = _prompts(rows["prompt"])
    target = np.sqrt(np.clip(ratio, 0.0, 16.0))
    idf, mean, scale = _scales(rows[first])
    design = _design(rows[first], idf, mean, scale)
    gram = (design @ design.T).toarray()
    use = prompt >= 0
    total = np.bincount(prompt[use], target[use], len(first)) / np.bincount(prompt[use], minlength=len(first))
    alpha, dual, out, centre = _ridge(gram, total, ALPHAS)
    weights, intercepts, groups = [design.T @ dual], [centre], []
    columns = np.full((len(rows), 2), centre)
    columns[use] = out[prompt[use], None]
    for group in _own_groups(rows["group"], use):
        mine = np.flatnonzero((rows["group"] == group) & use)
        at, back = np.unique(prompt[mine], return_inverse=True)
        mean_target = np.bincount(back, target[mine]) / np.bincount(back)
        _, dual, out, centre = _ridge(gram[np.ix_(at, at)], mean_target, (alpha,))
        columns[mine, 1] = out[back]
        weights.append(design[at].T @ dual)
        intercepts.append(centre)
        groups.append(group)
    head = TextHead(np.array(weights), np.array(intercepts), np.array(groups, np.uint64), idf, mean, scale)
    return head, columns


def _prompts(fingerprint: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """First row of each of the newest prompts, and each row's prompt (-1: too old)."""
    _, first, inverse = np.unique(fingerprint, return_index=True, return_inverse=True)
    newest = np.sort(np.argsort(first)[-MAX_PROMPTS:])
    number = np.full(len(first), -1)
    number[newest] = np.arange(len(newest))
    return first[newest], number[inverse]


def _own_groups(group: NDArray[np.uint64], use: NDArray[np.bool_]) -> list[int]:
    """Groups that get a head of their own, sorted; none if all rows are of one."""
    names, counts = np.unique(group[use], return_counts=True)
    if len(names) == 1:
        return []
    large = np.argsort(-counts, kind="stable")[:MAX_GROUPS]
    return sorted(names[large][counts[large] >= MIN_GROUP])


def _own_column(group: NDArray[np.uint64], groups: NDArray[np.uint64]) -> NDArray[np.intp]:
    if len(groups) == 0:
        return np.zeros(len(group), np.intp)
    at = np.minimum(np.searchsorted(groups, group), len(groups) - 1)
    return np.where(groups[at] == group, at + 1, 0)


def _ridge(gram: Floats, target: Floats, alphas: tuple[float, ...]) -> tuple[float, Floats, Floats, float]:
    """Dual ridge with the alpha of least leave-one-out absolute error: (alpha, dual [m], left-out answers [m], mean).

    Left-out answer of i: y_i - (A y)_i / A_ii with A = (K + alpha I)^-1 and y centred (Cawley and Talbot).
    """
    centre = float(target.mean())
    y, best = target - centre, None
    for alpha in alphas:
        inverse = linalg.inv(gram + alpha * np.eye(len(gram)), check_finite=False, overwrite_a=True)
        dual = inverse @ y
        out = y - dual / np.diag(inverse)
        error = float(np.abs(y - out).mean())
        if best is None or error < best[0]:
            best = (error, alpha, dual, centre + out)
    assert best is not None
    return best[1], best[2], best[3], centre


def _scales(rows: Rows) -> tuple[Floats, Floats, Floats]:
    """Inverse document frequencies [HASH_BINS]; mean and scale [DENSE] of the known dense values (scale 0: constant)."""
    counts = _counts(rows)
    seen = np.bincount(counts.indices, minlength=HASH_BINS)
    idf = np.where(seen >= 2, 1 + np.log((1 + len(rows)) / (1 + seen)), 0.0)
    dense = rows["dense"].astype(np.float64)
    known = np.isfinite(dense)
    n = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, dense, 0).sum(axis=0) / n
    spread = np.sqrt(np.where(known, (dense - mean) ** 2, 0).sum(axis=0) / n)
    return idf, mean, np.divide(1.0, spread, out=np.zeros(DENSE), where=spread > 1e-6)


def _counts(rows: Rows) -> sparse.csr_matrix:
    """Counts of hashed n-grams [n, HASH_BINS]."""
    there = rows["grams"] != EMPTY
    indptr = np.append(0, np.cumsum(there.sum(axis=1)))
    indices = rows["grams"][there].astype(np.int32)
    counts = sparse.csr_matrix((np.ones(len(indices)), indices, indptr), (len(rows), HASH_BINS))
    counts.sum_duplicates()
    return counts


def _design(rows: Rows, idf: Floats, mean: Floats, scale: Floats) -> sparse.csr_matrix:
    """[n, HASH_BINS + DENSE]: n-grams as unit vectors of log counts times idf, dense columns standardised."""
    grams = _counts(rows)
    grams.data = (1 + np.log(grams.data)) * idf[grams.indices]
    length = np.sqrt(np.asarray(grams.multiply(grams).sum(axis=1)).ravel())
    grams = sparse.diags(1 / np.maximum(length, 1e-9)) @ grams
    dense = np.clip((rows["dense"] - mean) * scale, -3, 3)
    return sparse.hstack([grams, sparse.csr_matrix(DENSE_WEIGHT * np.nan_to_num(dense))]).tocsr()
