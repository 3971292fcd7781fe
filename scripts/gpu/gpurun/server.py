"""One SGLang server as a child process: started with given flags, waited for, measured, and stopped without a
trace.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

STOCK, OURS = "sglang.launch_server", "sglang_slo.launch_server"
POLL_S = 0.25


class ServerError(RuntimeError):
    """A server that did not come up or went away; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a name for the results and the command line that makes it."""

    name: str
    module: str
    flags: tuple[str, ...] = ()


@dataclass
class Server:
    """A running server of an arm. Use `start`; `stop` is safe to call at any time, also twice."""

    arm: Arm
    port: int
    log: Path
    start_s: float = 0.0  # process start to healthy
    process: subprocess.Popen[bytes] | None = None
    _sink: IO[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, flags: list[str], env: dict[str, str], limit_s: float) -> Server:
        """Start and wait until it answers. Raises ServerError after `limit_s` or if it ends first."""
        command = [sys.executable, "-m", self.arm.module, *flags, *self.arm.flags, "--port", str(self.port)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._sink = self.log.open("ab")
        self._sink.write((" ".join(command) + "\n").encode())
        self._sink.flush()
        begin = time.monotonic()
        self.process = subprocess.Popen(
            command, env={**os.environ, **env}, stdout=self._sink, stderr=subprocess.STDOUT
        )
        try:
            while not self._healthy():
                if self.process.poll() is not None:
                    raise ServerError(f"{self.arm.name}: ended with {self.process.returncode}\n{self.tail()}")
                if time.monotonic() - begin > limit_s:
                    raise ServerError(f"{self.arm.name}: not up after {limit_s:.0f} s\n{self.tail()}")
                time.sleep(POLL_S)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.monotonic() - begin
        return self

    def stop(self) -> None:
        """End the process and all its children."""
        import psutil

        if self.process is None:
            return
        try:
            family = psutil.Process(self.process.pid)
            members = [*family.children(recursive=True), family]
        except psutil.NoSuchProcess:
            members = []
        for member in reversed(members):
            _signal(member, signal.SIGTERM)
        _, alive = psutil.wait_procs(members, timeout=10)
        for member in alive:
            _signal(member, signal.SIGKILL)
        self.process.wait()
        self.process = None
        if self._sink:
            self._sink.close()

    def get(self, path: str, limit_s: float = 30.0) -> str:
        """Body of a GET. Raises OSError."""
        with urllib.request.urlopen(self.url + path, timeout=limit_s) as answer:
            return answer.read().decode()

    def post(self, path: str, body: Any = None, limit_s: float = 120.0) -> Any:
        """Body of a POST with a JSON body, decoded if it is JSON. Raises OSError."""
        data = json.dumps(body if body is not None else {}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=limit_s) as answer:
            text = answer.read().decode()
        try:
            return json.loads(text)
        except ValueError:
            return text

    def flush(self) -> None:
        """Empty the prefix cache: no run profits from the one before. Raises ServerError."""
        for _ in range(40):
            try:
                self.post("/flush_cache")
                return
            except urllib.error.HTTPError:  # requests are still leaving
                time.sleep(POLL_S)
        raise ServerError(f"{self.arm.name}: the cache could not be flushed\n{self.tail()}")

    def counters(self) -> dict[str, float]:
        """Prometheus samples by name, summed over labels; empty if the server has no /metrics."""
        try:
            return sums(self.get("/metrics"))
        except OSError:
            return {}

    def status(self) -> Any:
        """`/slo/status`, or None on stock."""
        try:
            return json.loads(self.get("/slo/status"))
        except (OSError, ValueError):
            return None

    def tail(self, lines: int = 25) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _healthy(self) -> bool:
        try:
            self.get("/health", limit_s=5)
            return True
        except OSError:
            return False


def sums(exposition: str) -> dict[str, float]:
    """Samples of a Prometheus page by metric name, summed over labels; unreadable lines left out."""
    total: dict[str, float] = {}
    for line in exposition.splitlines():
        name, _, value = line.strip().rpartition(" ")
        if not name or name.startswith("#"):
            continue
        name = name.split("{", 1)[0]
        try:
            total[name] = total.get(name, 0.0) + float(value)
        except ValueError:
            continue
    return total


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _signal(member: Any, which: int) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        member.send_signal(which)
