"""One round of learning: fit on the older requests, judge on the newest, say whether the new model is better.

The same function serves the child process of a server and the inline training of the twin. A candidate is taken if its
pinball loss on fresh requests, which neither model was fitted on, is not worse than the current model's. The
fresh requests then start the new model's calibration.

As a child: `python -m sglang_slo.estimator.training FOLDER SEED` reads the snapshot there and leaves a candidate.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sglang_slo.estimator import store
from sglang_slo.estimator.features import Rows
from sglang_slo.estimator.model import LengthModel, fit, pinball
from sglang_slo.estimator.reservoir import load_snapshot, split
from sglang_slo.estimator.store import Saved

MIN_ROWS = 200  # finished requests before the first model
FRESH_SHARE, MAX_FRESH = 0.2, 1024  # newest requests kept out of the fit
TOLERANCE = 1.01  # a candidate may be this much worse: it knows the newer traffic
REJECTED = 3  # exit code of a child whose candidate was not better


def learn(content: NDArray[np.void], current: LengthModel | None, seed: int) -> Saved | None:
    """A model from finished requests (oldest first), None if it is no better than `current` on the newest.

    Raises ValueError with fewer than `MIN_ROWS` requests.
    """
    if len(content) < MIN_ROWS:
        raise ValueError(f"finished requests: need at least {MIN_ROWS}, got {len(content)}")
    rows, lengths = split(content)
    fresh = min(MAX_FRESH, int(FRESH_SHARE * len(content)))
    model = fit(rows[:-fresh], lengths[:-fresh], seed)
    new_rows, new_lengths = rows[-fresh:], lengths[-fresh:]
    raw = model.predict(new_rows)
    loss = pinball(raw, new_lengths)
    old = pinball(current.predict(new_rows), new_lengths) if current is not None else None
    if old is not None and loss > old * TOLERANCE:
        return None
    about = {
        "seen_from": int(content["order"][0]),
        "seen_to": int(content["order"][-1]),
        "fresh_rows": fresh,
        "pinball_tokens": loss,
        "pinball_tokens_before": old,
    }
    return Saved(model, raw, np.log(np.maximum(new_lengths, 1.0)), about)


def offline(rows: Rows, lengths: NDArray[np.floating], seed: int) -> Saved:
    """A model from a file of requests in no particular order: the calibration rows are whole prompts drawn by chance."""
    names, inverse = np.unique(rows["prompt"], return_inverse=True)
    held = (np.random.default_rng(seed).permutation(len(names)) < FRESH_SHARE * len(names))[inverse]
    model = fit(rows[~held], lengths[~held], seed)
    raw = model.predict(rows[held])
    about = {"fresh_rows": int(held.sum()), "pinball_tokens": pinball(raw, lengths[held])}
    return Saved(model, raw, np.log(np.maximum(lengths[held], 1.0)), about)


def main(folder: Path, seed: int) -> int:
    """The child's work; its exit code is 0 (a candidate lies in the folder) or `REJECTED`."""
    with contextlib.suppress(OSError):
        os.nice(10)
    content = load_snapshot(folder / store.SNAPSHOT)
    try:
        current: LengthModel | None = store.load(folder / store.CURRENT).model
    except store.StoreError:
        current = None
    saved = learn(content, current, seed)
    if saved is None:
        return REJECTED
    store.save(folder / store.CANDIDATE, saved)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
