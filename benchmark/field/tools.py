"""Starts tools of the field, each by the python of its own environment (env.sh), and ends them with all they started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
START_S = 300.0


class ToolError(RuntimeError):
    """A tool that did not do its work; the message ends with the last lines of its log."""


def python_of(tool: str) -> Path:
    """The python of a tool's environment, which is made first. Raises ToolError."""
    done = subprocess.run([HERE / "env.sh", tool], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ToolError(f"env.sh {tool} ended with status {done.returncode}")
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
    """A program to its end. Raises ToolError."""
    with log.open("wb") as out:
        process = _start(command, out, env or {})
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise ToolError(f"{command[0]}: not done in {limit_s:g} s:\n{tail(log)}") from None
        finally:
            _stop(process)
    if process.returncode:
        raise ToolError(f"{command[0]} ended with status {process.returncode}:\n{tail(log)}")


@contextmanager
def running(
    command: Sequence[str], ready_url: str, log: Path, env: dict[str, str] | None = None
) -> Iterator[None]:
    """A program that serves, once `ready_url` answers. Raises ToolError."""
    with log.open("wb") as out:
        process = _start(command, out, env or {})
    try:
        deadline = time.monotonic() + START_S
        while not _answers(ready_url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ToolError(f"{command[0]} does not answer:\n{tail(log)}")
            time.sleep(0.3)
        yield
    finally:
        _stop(process)


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-25:])


def _start(command: Sequence[str], out: object, env: dict[str, str]) -> subprocess.Popen[bytes]:
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.Popen(
        list(command),
        stdout=out,  # type: ignore[arg-type]
        stderr=subprocess.STDOUT,
        env={**outside, "HF_HUB_OFFLINE": "1", **env},
        start_new_session=True,
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
