"""Where learning happens: in a child process beside a server, or in line for the twin.

Both take what the reservoir holds and come back with a model or without. The child's side of the work (snapshot,
process, reading the model back) runs in one thread that only ever hands over a finished result: the scheduler's loop
neither waits nor touches a file.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import sglang_slo
from sglang_slo.estimator import features, store
from sglang_slo.estimator.model import LengthModel
from sglang_slo.estimator.reservoir import save_snapshot
from sglang_slo.estimator.store import Saved
from sglang_slo.estimator.training import REJECTED, learn

CHILD_LIMIT_S = 600.0  # a child that takes longer is killed
Content = Callable[[], NDArray[np.void]]


@dataclass(frozen=True)
class Outcome:
    """What one round of learning came to: a model, or why there is none (`rejected` is not an error)."""

    saved: Saved | None = None
    rejected: bool = False
    error: str = ""


class InlineTrainer:
    """Learns at once, in this process: deterministic, for virtual time."""

    def __init__(self) -> None:
        self._outcome: Outcome | None = None

    def start(self, content: Content, current: LengthModel | None, seed: int) -> None:
        """Learn now."""
        try:
            saved = learn(content(), current, seed)
            self._outcome = Outcome(saved, rejected=saved is None)
        except ValueError as error:
            self._outcome = Outcome(error=str(error))

    @property
    def busy(self) -> bool:
        """Never: `start` returns when it is done."""
        return False

    def collect(self) -> Outcome | None:
        """The outcome of the last `start`, once."""
        outcome, self._outcome = self._outcome, None
        return outcome

    def close(self) -> None:
        """Nothing to stop."""


class ChildTrainer:
    """Learns in a child process of low priority that works in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._outcome: Outcome | None = None
        self._closed = False

    def start(self, content: Content, current: LengthModel | None, seed: int) -> None:
        """Begin a round; `content` is called in the thread. The child reads the current model from the folder."""
        self._thread = threading.Thread(
            target=self._work, args=(content, seed), name="slo-lengths", daemon=True
        )
        self._thread.start()

    @property
    def busy(self) -> bool:
        """True while a round is under way."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def pid(self) -> int | None:
        """Process id of the child at work, if there is one."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def collect(self) -> Outcome | None:
        """The outcome of a finished round, once."""
        if self.busy:
            return None
        outcome, self._outcome = self._outcome, None
        return outcome

    def close(self) -> None:
        """Stop the child; the folder keeps what was there before."""
        self._closed = True
        process, thread = self._process, self._thread
        if process is not None:
            with contextlib.suppress(OSError):
                process.kill()
        if thread is not None:
            thread.join(timeout=10)

    def _work(self, content: Content, seed: int) -> None:
        try:
            self._outcome = self._round(content, seed)
        except Exception as error:  # whatever it is must not pass for success, nor reach the scheduler
            self._outcome = Outcome(error=f"{type(error).__name__}: {error}")

    def _round(self, content: Content, seed: int) -> Outcome:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_snapshot(self.folder / store.SNAPSHOT, content())
        if self._closed:
            return Outcome(error="closed")
        code, message = self._child(seed)
        if code == REJECTED:
            return Outcome(rejected=True)
        if code != 0:
            return Outcome(error=f"training child ended with {code}: {message}")
        saved = store.load(self.folder / store.CANDIDATE)
        saved.model.predict(np.zeros(1, features.ROW))  # the first call sets the tree library up
        store.promote(self.folder)
        return Outcome(saved)

    def _child(self, seed: int) -> tuple[int, str]:
        root = str(Path(sglang_slo.__file__).parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "sglang_slo.estimator.training", str(self.folder), str(seed)]
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            _, errors = self._process.communicate(timeout=CHILD_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            _, errors = self._process.communicate()
        return self._process.returncode, errors.decode(errors="replace").strip()[-300:]
