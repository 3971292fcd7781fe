"""Finished requests to learn from: features and length, no text, a fixed number of them.

The newest `RECENT` are all kept; older ones survive by chance (reservoir sampling), so that rare kinds of request are
not forgotten the moment traffic turns. Memory and the snapshot on disk have a size that does not grow.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sglang_slo.estimator import features
from sglang_slo.estimator.features import ROW, Rows
from sglang_slo.estimator.store import write_atomically

CAPACITY, RECENT = 4096, 2048
FINISHED = np.dtype([("row", ROW), ("output_tokens", np.float32), ("order", np.int64)])
_MAGIC = f"SLO-FINISHED {features.VERSION}\n".encode()


class Reservoir:
    """Up to `capacity` finished requests, the newest `recent` for certain. Seeded: same stream, same content."""

    def __init__(self, capacity: int = CAPACITY, recent: int = RECENT, seed: int = 0) -> None:
        self.capacity, self.recent = capacity, min(recent, capacity)
        self._rows = np.zeros(capacity, FINISHED)
        self._random = np.random.default_rng(seed)
        self.seen = 0
        self._old = capacity - self.recent  # slots for requests that are not recent any more

    def __len__(self) -> int:
        return min(self.seen, self.recent) + min(max(0, self.seen - self.recent), self._old)

    def add(self, row: bytes, output_tokens: int) -> None:
        """Keep one finished request; the one it pushes out of the recent ones may live on among the old."""
        slot = self._old + self.seen % self.recent
        pushed = self.seen - self.recent  # how many were pushed out before this one
        if pushed >= 0 and self._old:
            place = pushed if pushed < self._old else int(self._random.integers(0, pushed + 1))
            if place < self._old:
                self._rows[place] = self._rows[slot]
        record = self._rows[slot : slot + 1]
        record["row"] = np.frombuffer(row, ROW)
        record["output_tokens"], record["order"] = output_tokens, self.seen
        self.seen += 1

    def content(self) -> NDArray[np.void]:
        """A copy of what is kept, oldest first; structured as `FINISHED`."""
        recent = self._rows[self._old : self._old + min(self.seen, self.recent)]
        old = self._rows[: min(max(0, self.seen - self.recent), self._old)]
        both = np.concatenate([old, recent])
        return np.asarray(both[np.argsort(both["order"], kind="stable")])

    def restore(self, content: NDArray[np.void]) -> None:
        """Start from an earlier `content`."""
        for record in content[-self.capacity :]:
            self.add(record["row"].tobytes(), int(record["output_tokens"]))


def save_snapshot(path: Path, content: NDArray[np.void]) -> None:
    """Write `content` atomically. Raises OSError."""
    write_atomically(path, _MAGIC, content)


def load_snapshot(path: Path) -> NDArray[np.void]:
    """Read a snapshot. Raises ValueError if it is damaged or of another version, OSError if it is not there."""
    data = path.read_bytes()
    if not data.startswith(_MAGIC) or (len(data) - len(_MAGIC)) % FINISHED.itemsize:
        raise ValueError(f"{path}: truncated, or not of features version {features.VERSION}")
    content = np.frombuffer(data[len(_MAGIC) :], FINISHED)
    if not np.isfinite(content["output_tokens"]).all() or (content["output_tokens"] < 0).any():
        raise ValueError(f"{path}: damaged lengths")
    return content


def split(content: NDArray[np.void]) -> tuple[Rows, NDArray[np.float32]]:
    """Rows [n] and output lengths [n] in tokens."""
    return np.asarray(content["row"]), np.asarray(content["output_tokens"])
