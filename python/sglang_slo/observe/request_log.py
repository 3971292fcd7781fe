"""The request log: one JSON line per finished request, rotated by size, written by a thread of its own.

The scheduler only puts a row on a bounded queue. Whatever goes wrong with the file (full disk, no
permission, slow disk) costs rows, never serving: lost rows are counted and reported once a minute. A row
that could not be written whole is cut off again, so that every line parses. `path` is the newest file,
`path.1` the one before.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import queue
import threading
import time
from pathlib import Path
from typing import Any

from sglang_slo import clock
from sglang_slo.observe.judge import RULE_NAMES, RequestRecord, Verdict, limits_of
from sglang_slo.observe.throttle import Throttle

logger = logging.getLogger(__name__)

QUEUE_ROWS = 10_000
KEEP_FILES = 4  # rotated files beside the newest
_STOP = None


def row(record: RequestRecord, verdict: Verdict, finished_at: float) -> dict[str, Any]:
    """A finished request as JSON values: fields of the record, figures of the verdict, its stream summarised.

    `finished_at`: seconds since 1970 (the record's times are on the package's clock, of arbitrary origin).
    """
    slo, figures = record.slo, verdict.figures
    skip = ("slo", "out", "text", "message")
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name not in skip}
    gap = dict.fromkeys(("longest_pause_s", "tbt_p99_s", "tpot_s", "pace_lag_s"))
    if record.out.gaps:
        gap |= {"longest_pause_s": figures.max_gap_s, "tbt_p99_s": figures.p99_gap_s}
        gap |= {"tpot_s": figures.tpot_s, "pace_lag_s": figures.pace_lag_s}
    out = {
        "finished_at": round(finished_at, 6),
        **fields,
        "first_token_s": record.out.first_s if record.out.tokens else None,
        "deliveries": record.out.gaps + (record.out.tokens > 0),
        "class": slo.slo_class,
        "importance": slo.importance,
        "rule": RULE_NAMES[slo.gap_rule],
        **{f"{name}_limit_s": limit_s for name, limit_s in limits_of(slo).items()},
        "attained": verdict.attained,
        "judged": verdict.judged,
        "missed": list(verdict.reasons),
        "attained_by_rule": verdict.by_rule,
        "ttft_s": verdict.ttft_s,
        "e2e_s": figures.e2e_s,
        **gap,
    }
    if record.message:
        out["message"] = record.message
    if record.text is not None:
        out["text"] = record.text
    return {key: _finite(value) for key, value in out.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replica_path(path: str | Path, dp_rank: int | None) -> Path:
    """The file of one data-parallel replica: `requests.jsonl` becomes `requests.dp1.jsonl` for rank 1."""
    path = Path(path)
    return path if dp_rank is None else path.with_name(f"{path.stem}.dp{dp_rank}{path.suffix}")


class RequestLog:
    """Appends rows to `path`; `write` never blocks and never raises."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_ROWS)
        self._trouble = Throttle(logger)
        # The one calendar time in the package: rows of different runs must sort.
        self._origin_s = time.time() - clock.now()
        self._fd: int | None = None
        self._size = 0
        self._thread = threading.Thread(target=self._run, name="slo-request-log", daemon=True)
        self._thread.start()

    @property
    def lost_rows(self) -> int:
        """Rows that could not be written."""
        return self._trouble.count

    def write(self, record: RequestRecord, verdict: Verdict, now_s: float) -> None:
        """Put a row on the queue; when that is full the row is lost and counted."""
        try:
            self._queue.put_nowait(row(record, verdict, self._origin_s + now_s))
        except queue.Full:
            self._trouble.happened(
                f"request log {self._path}: the disk does not keep up, rows are lost", now_s
            )

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is queued and stop, waiting at most `timeout_s`."""
        try:
            self._queue.put(_STOP, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (next_row := self._queue.get()) is not _STOP:
            try:
                self._append(json.dumps(next_row, default=float).encode() + b"\n")
            except Exception as error:
                self._close_file()
                self._trouble.happened(f"request log {self._path}: row lost: {error}", clock.now())
        self._close_file()

    def _append(self, line: bytes) -> None:
        if self._fd is None:
            self._open()
        if self._size and self._size + len(line) > self._max_bytes:
            self._close_file()
            self._rotate()
            self._open()
        assert self._fd is not None
        written = 0
        try:
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError:
            if written:
                os.ftruncate(self._fd, self._size)
            raise
        self._size += len(line)

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._size = os.fstat(self._fd).st_size

    def _close_file(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _rotate(self) -> None:
        for age in range(KEEP_FILES, 0, -1):
            older = self._path if age == 1 else self._numbered(age - 1)
            if older.exists():
                older.replace(self._numbered(age))

    def _numbered(self, age: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{age}")
