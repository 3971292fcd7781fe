"""The request log holds what the length model needs, stays parseable, and never gets in the way."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from observed import make_record
from sglang_slo.core.slo import Slo
from sglang_slo.observe import request_log
from sglang_slo.observe.judge import judge
from sglang_slo.observe.request_log import KEEP_FILES, RequestLog, replica_path, row


def write(path: Path, number: int, max_bytes: int = 10**6, **fields: Any) -> RequestLog:
    log = RequestLog(path, max_bytes)
    for i in range(number):
        record = make_record(0.1, (0.01, 0.02), Slo(0.5, math.inf, "chat"), rid=f"r{i}", **fields)
        log.write(record, judge(record), 1.0)
    log.close()
    return log


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_row_holds_features_lengths_limits_and_verdict(tmp_path: Path) -> None:
    features = {"prompt_tokens": 7, "temperature": 0.5, "odd": math.nan}
    write(tmp_path / "log.jsonl", 1, features=features, predicted_tokens=12.5)
    (line,) = read(tmp_path / "log.jsonl")
    assert line["features"] == {"prompt_tokens": 7, "temperature": 0.5, "odd": None}
    assert (line["output_tokens"], line["prompt_tokens"], line["predicted_tokens"]) == (3, 7, 12.5)
    assert (line["class"], line["ttft_limit_s"], line["tbt_limit_s"]) == ("chat", 0.5, None)
    assert (line["attained"], line["missed"], line["rule"]) == (True, [], "every")
    assert (line["tbt_p99_s"], line["longest_pause_s"]) == (pytest.approx(0.02), pytest.approx(0.02))


def test_rows_without_text_have_no_prompt() -> None:
    record = make_record(0.1)
    assert "text" not in row(record, judge(record), 0.0)


def test_rotation_keeps_the_newest_rows_in_bounded_space(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, 200, max_bytes=3000)
    files = [path, *(tmp_path / f"log.jsonl.{age}" for age in range(1, KEEP_FILES + 1))]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(f.stat().st_size <= 3000 for f in files)
    rids = [line["rid"] for f in reversed(files) for line in read(f)]
    assert rids == [f"r{i}" for i in range(200 - len(rids), 200)]


def test_a_restart_appends(tmp_path: Path) -> None:
    write(tmp_path / "log.jsonl", 2)
    write(tmp_path / "log.jsonl", 3)
    assert len(read(tmp_path / "log.jsonl")) == 5


def test_unwritable_path_costs_rows_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = write(tmp_path / "file" / "log.jsonl", 3)
    assert log.lost_rows == 3


def test_full_disk_leaves_only_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.write, [0]

    def full(fd: int, data: bytes) -> int:
        calls[0] += 1
        if calls[0] % 3 == 2:
            return real(fd, data[:10])
        if calls[0] % 3 == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(request_log.os, "write", full)
    log = write(tmp_path / "log.jsonl", 4)
    assert [line["rid"] for line in read(tmp_path / "log.jsonl")] == ["r0", "r2"]
    assert log.lost_rows == 2


def test_disk_that_hangs_never_blocks_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "QUEUE_ROWS", 5)
    monkeypatch.setattr(RequestLog, "_run", lambda self: None)
    log = RequestLog(tmp_path / "log.jsonl", 1000)
    record = make_record(0.1)
    for _ in range(9):
        log.write(record, judge(record), 0.0)
    assert log.lost_rows == 4


def test_replicas_write_to_files_of_their_own() -> None:
    assert replica_path("a/log.jsonl", None) == Path("a/log.jsonl")
    assert {replica_path("a/log.jsonl", r) for r in (0, 1)} == {
        Path("a/log.dp0.jsonl"),
        Path("a/log.dp1.jsonl"),
    }
