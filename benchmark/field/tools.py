"""Starts tools of the field, each by the python of its own environment (env.sh), and ends them with all they started."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from child_process import Child, ChildError

HERE = Path(__file__).resolve().parent
START_S = 300.0


def python_of(tool: str) -> Path:
    """The python of a tool's environment, which is made first. Raises ChildError."""
    done = subprocess.run([HERE / "env.sh", tool], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ChildError(f"env.sh {tool} ended with status {done.returncode}")
    return Path(done.stdout.splitlines()[-1])


def program_of(tool: str, name: str = "") -> list[str]:
    """The command of a program that a tool installs."""
    return [str(python_of(tool).with_name(name or tool))]


def version_of(tool: str, package: str = "") -> str:
    """A tool's name and version."""
    code = f"import importlib.metadata as m; print(m.version({package or tool!r}))"
    done = subprocess.run([python_of(tool), "-c", code], capture_output=True, text=True, check=True)
    return f"{package or tool} {done.stdout.strip()}"


def run(command: Sequence[str], log: Path, limit_s: float, env: dict[str, str] | None = None) -> None:
    """A program to its end. Raises ChildError."""
    child = _child(command, log, env)
    try:
        child.finished(limit_s)
    finally:
        child.stop()


@contextmanager
def running(
    command: Sequence[str], ready_url: str, log: Path, env: dict[str, str] | None = None
) -> Iterator[None]:
    """A program that serves, once `ready_url` answers. Raises ChildError."""
    child = _child(command, log, env)
    try:
        child.answering(ready_url, START_S)
        yield
    finally:
        child.stop()


def _child(command: Sequence[str], log: Path, env: dict[str, str] | None) -> Child:
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    log.unlink(missing_ok=True)
    return Child(command, log, {**outside, "HF_HUB_OFFLINE": "1", **(env or {})})
