"""One SGLang server as a child process: started with given flags, waited for, measured, and stopped without a
trace.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from child_process import Child, ChildError, tail

STOCK, OURS = "sglang.launch_server", "sglang_slo.launch_server"
POLL_S = 0.25


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
    child: Child | None = None

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, flags: list[str], env: dict[str, str], limit_s: float) -> Server:
        """Start and wait until it answers. Raises ChildError after `limit_s` or if it ends first."""
        command = [sys.executable, "-m", self.arm.module, *flags, *self.arm.flags, "--port", str(self.port)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            log.write(" ".join(command) + "\n")
        begin = time.monotonic()
        # in this session: who ends the run ends its servers
        self.child = Child(command, self.log, {**os.environ, **env}, session=False)
        try:
            self.child.answering(self.url + "/health", limit_s)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.monotonic() - begin
        return self

    def stop(self) -> None:
        """End the process and all its children."""
        if self.child is not None:
            self.child.stop()
            self.child = None

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
        """Empty the prefix cache: no run profits from the one before. Raises ChildError."""
        for _ in range(40):
            try:
                self.post("/flush_cache")
                return
            except urllib.error.HTTPError:  # requests are still leaving
                time.sleep(POLL_S)
        raise ChildError(f"{self.arm.name}: the cache could not be flushed\n{tail(self.log)}")

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
