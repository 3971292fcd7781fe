"""A program as a child process: started, waited for until it answers, and ended with all that it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

POLL_S = 0.25
GRACE_S = 20.0  # a launcher of servers takes its own children down


class ChildError(RuntimeError):
    """A program that did not do its work; the message ends with the last lines of its log."""


class Child:
    """A running program with its output in `log`.

    `session`: it has its own, so the keyboard's interrupt reaches the parent only. `env`: all of its environment.
    """

    def __init__(
        self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, session: bool = True
    ) -> None:
        self.command, self.log, self._session = list(command), log, session
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=session
            )

    def answering(self, url: str, limit_s: float) -> None:
        """Wait until GET `url` is answered with 200. Raises ChildError if it ends before that, or after `limit_s`."""
        deadline_s = time.monotonic() + limit_s
        while not answers(url):
            if self.process.poll() is not None:
                raise ChildError(
                    f"{self._name} ended with status {self.process.returncode}:\n{tail(self.log)}"
                )
            if time.monotonic() > deadline_s:
                raise ChildError(f"{self._name} did not answer within {limit_s:.0f} s:\n{tail(self.log)}")
            time.sleep(POLL_S)

    def finished(self, limit_s: float) -> None:
        """Wait for its end. Raises ChildError after `limit_s`, or if it ended with an error."""
        try:
            status = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise ChildError(f"{self._name}: not done in {limit_s:g} s:\n{tail(self.log)}") from None
        if status:
            raise ChildError(f"{self._name} ended with status {status}:\n{tail(self.log)}")

    def stop(self, grace_s: float = GRACE_S) -> None:
        """The program first, in its own time; then whatever is left of its family. Safe to call twice."""
        family: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
        if grace_s > 0 and self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        self.process.kill()
        if self._session:  # also those whose parent ended before them
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait()

    @property
    def _name(self) -> str:
        return " ".join(self.command[:3])


def answers(url: str) -> bool:
    """Whether GET `url` is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def tail(log: Path, lines: int = 25) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
