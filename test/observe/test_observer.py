"""The observer counts everything, influences nothing and survives anything."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from observed import make_record
from sglang_slo.config import SloConfig
from sglang_slo.core.slo import Slo
from sglang_slo.observe.gauges import Gauges, Headroom
from sglang_slo.observe.observer import Observer

CHAT = Slo(0.5, 0.05, "chat")


def make_observer(**settings: Any) -> Observer:
    return Observer(SloConfig(**settings), start_s=0.0)


def busy_gauges() -> Gauges:
    return Gauges(
        running=np.int64(3),  # type: ignore[arg-type]
        queued={"chat": 2, "batch": np.int64(5)},  # type: ignore[dict-item]
        budget_s=np.float64(0.04),
        kv={"free": 10, "held": np.float32(2.5)},  # type: ignore[dict-item]
        latency={"t0_s": math.nan},
        headroom={"chat": Headroom(1e3, 200)},
    )


def test_snapshot_travels_between_processes_and_as_json() -> None:
    observer = make_observer()
    observer.arrived(CHAT, 1.0)
    observer.finished(make_record(0.1, (0.01,), CHAT, parked=1), 2.0)
    snapshot = observer.snapshot(3.0, busy_gauges)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot)) == snapshot
    assert json.loads(json.dumps(snapshot, allow_nan=False)) == snapshot
    assert snapshot["now"]["queued"] == {"chat": 2, "batch": 5}
    assert snapshot["now"]["latency"] == {"t0_s": None}
    assert snapshot["totals"]["parked"] == 1
    assert snapshot["windows"]["1m"]["chat"]["attainment"] == 1.0


def test_fallback_is_counted_each_time_and_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    observer = make_observer()
    with caplog.at_level(logging.ERROR):
        for second in range(90):
            try:
                raise ValueError("odd plan")
            except ValueError as error:
                observer.fallback(error, float(second))
    assert observer.snapshot(90.0)["fallbacks"] == {"count": 90, "last": "ValueError: odd plan"}
    assert len(caplog.records) == 2
    assert "60 times" in caplog.records[1].getMessage()
    assert caplog.records[0].exc_info


def test_other_ranks_judge_alike_and_count_nothing() -> None:
    observers = [Observer(SloConfig(), rank0=rank0, start_s=0.0) for rank0 in (True, False)]
    record = make_record(0.9, (0.01,), CHAT)
    verdicts = [observer.finished(record, 1.0) for observer in observers]
    assert verdicts[0] == verdicts[1]
    assert observers[1].snapshot(1.0)["totals"] == {}


def test_broken_record_is_reported_and_not_raised(caplog: pytest.LogCaptureFixture) -> None:
    observer = make_observer()
    assert observer.finished(None, 1.0) is None  # type: ignore[arg-type]
    observer.arrived(None, 1.0)  # type: ignore[arg-type]
    assert observer.snapshot(1.0)["observer_errors"] == 2


def test_prompt_is_logged_only_when_asked(tmp_path: Path) -> None:
    for asked in (False, True):
        path = tmp_path / f"{asked}.jsonl"
        observer = make_observer(request_log=str(path), request_log_text=asked)
        observer.finished(make_record(0.1, text="my secret"), 1.0)
        observer.close()
        assert ("my secret" in path.read_text()) == asked


def test_no_log_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    observer = make_observer()
    observer.finished(make_record(0.1), 1.0)
    observer.close()
    assert not list(tmp_path.iterdir())
