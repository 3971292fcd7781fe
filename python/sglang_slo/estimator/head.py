"""The text head: kernel ridge on hashed n-grams and dense columns, whose answer the trees see as one more column.

Trees are poor at adding up many weak words, a kernel model is good at it: linear in the n-grams plus Gaussian in the
standardised dense columns (by Nystroem's method, so that a prediction costs `LANDMARKS` distances).
The target is sqrt(length / typical length of
the model): its mean lies near the median of skewed lengths. Trees must not see answers that the head learnt by heart,
so training rows get leave-one-prompt-out predictions, which the dual form gives in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from sglang_slo.estimator.features import DENSE, EMPTY, HASH_BINS, SLOTS, Rows

MAX_PROMPTS = 1500  # newest prompts that take part: the solve is cubic in them
MIN_GROUP = 100  # prompts a model must have answered to get a head of its own
MAX_GROUPS = 32
ALPHAS = (0.5, 1.0, 2.0, 4.0)
LANDMARKS = 384  # prompts that the Gaussian part is spanned by
GAUSS_WEIGHT, GAUSS_WIDTH = (
    3.0,
    0.5,
)  # of the Gaussian part beside unit-length n-grams; in median squared distances

Floats = NDArray[np.float64]


@dataclass
class TextHead:
    """`words` [1 + G, HASH_BINS] and `gauss` [1 + G, LANDMARKS or fewer]: weights of everybody's head and of each
    group's own; `intercepts` [1 + G]; `groups` [G] sorted name hashes; `space` what both are measured in."""

    words: Floats
    gauss: Floats
    intercepts: Floats
    groups: NDArray[np.uint64]
    space: Space

    def predict(self, rows: Rows) -> Floats:
        """Columns [n, 2]: everybody's head, and the row's group's own (everybody's where it has none)."""
        answers = self.space.gauss(rows) @ self.gauss.T + self.space.dot_words(rows, self.words)
        answers += self.intercepts
        own = _own_column(rows["group"], self.groups)
        return np.stack([answers[:, 0], answers[np.arange(len(rows)), own]], axis=1)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """What a model file stores."""
        mine = {f"head_{name}": getattr(self, name) for name in _FIELDS}
        return mine | {f"space_{name}": getattr(self.space, name) for name in _SPACE_FIELDS}

    @staticmethod
    def from_arrays(arrays: dict[str, NDArray[np.generic]]) -> TextHead:
        """Inverse of `arrays`. Raises KeyError or ValueError on a wrong shape."""
        space = Space(**{name: np.asarray(arrays[f"space_{name}"]) for name in _SPACE_FIELDS})
        mine: dict[str, Any] = {name: np.asarray(arrays[f"head_{name}"]) for name in _FIELDS}
        head = TextHead(space=space, **mine)
        if head.words.shape != (1 + len(head.groups), HASH_BINS) or space.landmarks.shape[1] != DENSE:
            raise ValueError("head: weights of another shape")
        return head


@dataclass
class Space:
    """Where prompts are compared. `idf` [HASH_BINS + 1], 0 for no n-gram; `mean`, `scale` [DENSE] of dense columns;
    `landmarks` [m, DENSE]
    standardised; `width` []: a squared distance, float32 throughout."""

    idf: Floats
    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    width: NDArray[np.float32]

    def words(self, rows: Rows) -> sparse.csr_matrix:
        """[n, HASH_BINS]: counts times idf, as rows of length one were no n-gram repeated."""
        there = rows["grams"] != EMPTY
        indptr = np.append(0, np.cumsum(there.sum(axis=1)))
        indices = rows["grams"][there].astype(np.int32)
        data = (self.idf[rows["grams"]] / self._word_length(rows)[:, None])[there]
        grams = sparse.csr_matrix((data, indices, indptr), (len(rows), HASH_BINS))
        grams.sum_duplicates()
        return grams

    def dot_words(self, rows: Rows, weights: Floats) -> Floats:
        """`words(rows)` @ weights^T, [n, k] for weights [k, HASH_BINS]; faster for small n."""
        grams = np.ascontiguousarray(rows["grams"]).ravel()
        there = np.flatnonzero(grams != EMPTY)
        used = grams[there].astype(np.intp)
        begin = np.searchsorted(there, SLOTS * np.arange(len(rows) + 1))
        scaled = weights * self.idf[:-1]
        sums = [_row_sums(w[used], begin) for w in (*scaled, self.idf[:-1] ** 2)]
        found: np.ndarray = np.stack(sums[:-1], axis=1) / np.sqrt(np.maximum(sums[-1], 1e-9))[:, None]
        return found

    def _word_length(self, rows: Rows) -> Floats:
        found: np.ndarray = np.sqrt(np.maximum((self.idf**2)[rows["grams"]].sum(axis=1), 1e-9))
        return found

    def dense(self, rows: Rows) -> NDArray[np.float32]:
        """[n, DENSE]: standardised, unknown values at the mean."""
        points = (rows["dense"] - self.mean) * self.scale
        points[np.isnan(points)] = 0
        return np.clip(points, -3, 3, out=points)

    def gauss(self, rows: Rows) -> NDArray[np.float32]:
        """[n, m]: exp(-distance^2 / width) to each landmark."""
        points = self.dense(rows)
        out = points @ self.landmarks.T
        out *= 2
        out -= (points**2).sum(axis=1)[:, None]
        out -= (self.landmarks**2).sum(axis=1)
        np.minimum(out, 0, out=out)
        out /= self.width
        found: np.ndarray = np.exp(out, out=out)
        return found


_SPACE_FIELDS = ("idf", "mean", "scale", "landmarks", "width")
_FIELDS = ("words", "gauss", "intercepts", "groups")


def fit(rows: Rows, ratio: Floats, seed: int = 0) -> tuple[TextHead, Floats]:
    """Head for `rows` [n] with `ratio` [n] = length / typical length, and its leave-one-prompt-out columns [n, 2]."""
    first, prompt = _prompts(rows["prompt"])
    target = np.sqrt(np.clip(ratio, 0.0, 16.0))
    space = _space(rows[first], seed)
    words, gauss = space.words(rows[first]), np.asarray(space.gauss(rows[first]), np.float64)
    root = _inverse_root(space)
    gram = (words @ words.T).toarray() + GAUSS_WEIGHT * (gauss @ root) @ (gauss @ root).T
    use = prompt >= 0
    head = TextHead(
        np.zeros((0, HASH_BINS)), np.zeros((0, len(root))), np.zeros(0), np.zeros(0, np.uint64), space
    )
    columns = np.zeros((len(rows), 2))
    alphas: tuple[float, ...] = ALPHAS
    groups = _own_groups(rows["group"], use)
    for group in [None, *groups]:
        mine = np.flatnonzero(use if group is None else (rows["group"] == group) & use)
        at, back = np.unique(prompt[mine], return_inverse=True)
        mean_target = np.bincount(back, target[mine]) / np.bincount(back)
        alpha, dual, out, centre = _ridge(gram[np.ix_(at, at)], mean_target, alphas)
        if group is None:
            columns[:] = centre
            columns[mine, 0] = out[back]
            alphas = (alpha,)
        columns[mine, 1] = out[back]
        head.words = np.vstack([head.words, words[at].T @ dual])
        head.gauss = np.vstack([head.gauss, GAUSS_WEIGHT * root @ (root.T @ (gauss[at].T @ dual))])
        head.intercepts = np.append(head.intercepts, centre)
    head.groups = np.array(groups, np.uint64)
    return head, columns


def _inverse_root(space: Space) -> Floats:
    """[m, k] R with R R^T the pseudo-inverse of the landmarks' own kernel (Nystroem)."""
    squares = (space.landmarks**2).sum(axis=1)
    distance = np.maximum(squares[:, None] + squares - 2 * space.landmarks @ space.landmarks.T, 0)
    values, vectors = linalg.eigh(np.exp(-distance.astype(np.float64) / float(space.width)))
    keep = values > 1e-6 * values[-1]
    return np.asarray(vectors[:, keep] / np.sqrt(values[keep]))


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


def _row_sums(values: Floats, begin: NDArray[np.intp]) -> Floats:
    """Sums [n] of values[begin[i]:begin[i + 1]]."""
    sums = np.zeros(len(begin) - 1)
    some = np.flatnonzero(begin[1:] > begin[:-1])
    if len(some):
        sums[some] = np.add.reduceat(values, begin[some])
    return sums


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


def _space(rows: Rows, seed: int) -> Space:
    """Document frequencies, scales of the known dense values (0: constant column) and landmarks of prompts [n]."""
    grams = np.sort(rows["grams"], axis=1)
    fresh = np.append(np.ones((len(rows), 1), bool), grams[:, 1:] != grams[:, :-1], axis=1)
    seen = np.bincount(grams[fresh], minlength=HASH_BINS + 1)
    idf = np.where(seen >= 2, 1 + np.log((1 + len(rows)) / (1 + seen)), 0.0)
    idf[EMPTY] = 0.0
    dense = rows["dense"].astype(np.float64)
    known = np.isfinite(dense)
    n = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, dense, 0).sum(axis=0) / n
    spread = np.sqrt(np.where(known, (dense - mean) ** 2, 0).sum(axis=0) / n)
    scale = np.divide(1.0, spread, out=np.zeros(DENSE), where=spread > 1e-6)
    small = [np.asarray(v, np.float32) for v in (mean, scale, np.zeros((0, DENSE)), 1.0)]
    space = Space(idf, *small)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:LANDMARKS]
    space.landmarks = space.dense(rows[chosen])
    squares = (space.landmarks**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * space.landmarks @ space.landmarks.T
    space.width = np.asarray(max(float(np.median(distances)), 1e-3) / GAUSS_WIDTH, np.float32)
    return space
