"""Starts a real server for a benchmark, waits until it answers, and takes it down again with all its
processes.

`stock` is SGLang's own `sglang.launch_server`, `slo` ours; both get the same flags and serve the same model.
Where no model is named both get the embedded demo model. One server runs at a time: an idle SGLang scheduler
spins, and would take a core from the one that is measured.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

MODULES = {"stock": "sglang.launch_server", "slo": "sglang_slo.launch_server"}
START_S = 600.0


class ServerError(RuntimeError):
    """The server did not come up; the message ends with the last lines of its log."""


def end_cleanly() -> None:
    """Make SIGTERM an exit like any other, so that servers are taken down when the benchmark is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def server(
    kind: str, flags: Sequence[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[str]:
    """A running server's URL. `log` receives all its output. Raises ServerError."""
    port = free_port()
    command = [sys.executable, "-m", MODULES[kind], *with_model(list(flags)), "--port", str(port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, log)
        yield url
    finally:
        _stop(process)


def with_model(flags: list[str]) -> list[str]:
    """The flags, with the demo model where none is named: stock has no default of its own."""
    if any(flag.split("=")[0] in ("--model-path", "--model") for flag in flags):
        return flags
    from sglang_slo.cpu.demo_model import demo_model_path

    extra = ["--model-path", str(demo_model_path()), "--dtype", "float32"]
    if "--max-total-tokens" not in flags:
        extra += ["--max-total-tokens", "65536"]
    return [*flags, *extra]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"the server ended with status {process.returncode}:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(url + "/health_generate", timeout=30) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.5)
    raise ServerError(f"the server did not answer within {START_S:.0f} s:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-25:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The launcher first, which takes its children down; then whatever is left of its session."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
