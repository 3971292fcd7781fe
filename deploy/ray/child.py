"""Starts one ordinary server as a child, waits until it answers, and ends it with all of its processes."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress

START_S = 1800.0  # weights may have to be read
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def started(command: list[str]) -> tuple[subprocess.Popen[bytes], str]:
    """A server that answers, and its URL; `--port` is added to the command. Raises RuntimeError."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [*command, "--port", str(port)], start_new_session=True, preexec_fn=_end_with_parent
    )
    url, deadline_s = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url + "/health", timeout=30):
            return process, url
        time.sleep(0.5)
    end(process)
    raise RuntimeError(f"{command[:3]} did not answer in {START_S:g} s or ended: {process.returncode}")


def end(process: subprocess.Popen[bytes]) -> None:
    """The launcher first, which takes its children down; then whatever is left of its session."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_with_parent() -> None:
    """An actor that is killed takes its server along (Linux)."""
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGTERM)
