"""Starts a real server for a benchmark, waits until it answers, and takes it down again with all its
processes.

`stock` is SGLang's own `sglang.launch_server`, `slo` ours; both get the same flags and serve the same model.
Where no model is named both get the embedded demo model. One server runs at a time: an idle SGLang scheduler
spins, and would take a core from the one that is measured.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from child_process import Child, free_port

MODULES = {"stock": "sglang.launch_server", "slo": "sglang_slo.launch_server"}
START_S = 600.0


def end_cleanly() -> None:
    """Make SIGTERM an exit like any other, so that servers are taken down when the benchmark is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def server(
    kind: str, flags: Sequence[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[str]:
    """A running server's URL. `log` receives all its output. Raises ChildError."""
    port = free_port()
    command = [sys.executable, "-m", MODULES[kind], *with_model(list(flags)), "--port", str(port)]
    log.unlink(missing_ok=True)
    child = Child(command, log, {**os.environ, **(environment or {})})
    try:
        url = f"http://127.0.0.1:{port}"
        child.answering(url + "/health_generate", START_S)
        yield url
    finally:
        child.stop()


def with_model(flags: list[str]) -> list[str]:
    """The flags, with the demo model where none is named: stock has no default of its own."""
    if any(flag.split("=")[0] in ("--model-path", "--model") for flag in flags):
        return flags
    from sglang_slo.cpu.demo_model import demo_model_path

    extra = ["--model-path", str(demo_model_path()), "--dtype", "float32"]
    if "--max-total-tokens" not in flags:
        extra += ["--max-total-tokens", "65536"]
    return [*flags, *extra]
