"""Times are taken when tokens leave, and a request is judged once, on whatever path it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_slo import clock
from sglang_slo.config import SloConfig
from sglang_slo.core.slo import Slo
from sglang_slo.observe.judge import RequestRecord
from sglang_slo.observe.observer import Observer

pytest.importorskip("sglang.srt.managers.schedule_batch")
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_MATCHED_STR,
    FINISH_MATCHED_TOKEN,
)

from sglang_slo.runtime.report.request_times import HEALTH_CHECK, HearingSender, Reporter, finish_of


class Kept(Observer):
    """An observer that keeps the records it judged."""

    def __init__(self) -> None:
        super().__init__(SloConfig(), start_s=0.0)
        self.records: list[RequestRecord] = []

    def finished(self, record: RequestRecord, now_s: float) -> Any:
        self.records.append(record)
        return super().finished(record, now_s)


@pytest.fixture(autouse=True)
def virtual_time() -> Iterator[None]:
    yield
    clock.use(None)


def make_req(row: int = 0, rid: str = "r", most: int = 10) -> Any:
    return SimpleNamespace(
        rid=rid,
        slo=Slo(0.5, 0.05, "chat"),
        slo_row=row,
        slo_slot=-1,
        output_ids=[],
        output_ids_through_stop=[1, 2],
        origin_input_ids=[1, 2, 3],
        origin_input_text="secret",
        cached_tokens=1,
        retraction_count=0,
        finished_reason=None,
        finished_len=None,
        sampling_params=SimpleNamespace(max_new_tokens=most, n=1),
    )


def run(reporter: Reporter, steps: list[tuple[float, list[Any]]]) -> None:
    """At each time, each listed request has one more token."""
    for now_s, reqs in steps:
        clock.use(lambda now_s=now_s: now_s)  # type: ignore[misc]
        for req in reqs:
            req.output_ids.append(1)
        reporter.streamed(reqs)


def test_first_token_and_gaps_are_timed_per_request() -> None:
    observer = Kept()
    reporter, a, b = Reporter(observer), make_req(0), make_req(2000)
    for req in (a, b):
        reporter.opened(req, 1.0, 1.0)
    run(reporter, [(1.2, [a]), (1.25, [a, b]), (1.5, [b])])
    a.finished_reason = b.finished_reason = FINISH_LENGTH(3)
    run(reporter, [(1.6, [a, b])])
    first, second = observer.records
    assert (first.out.first_s, first.out.gaps) == (1.2, 2)
    assert first.out.p99_gap_s == pytest.approx(0.35)
    assert (second.out.first_s, second.out.gaps) == (1.25, 2)
    assert second.out.p99_gap_s == pytest.approx(0.25)
    assert json.loads(a.finished_reason.to_json()["slo"])["missed"] == ["gap"]


def test_a_pass_without_a_new_token_is_no_gap() -> None:
    observer = Kept()
    reporter, req = Reporter(observer), make_req()
    reporter.opened(req, 0.0, 0.0)
    run(reporter, [(1.0, [req])])
    clock.use(lambda: 5.0)
    reporter.streamed([req])  # a middle chunk, or the pass after a retraction
    req.finished_reason = FINISH_LENGTH(2)
    run(reporter, [(9.0, [req])])
    assert observer.records[0].out.max_gap_s == 8.0


def test_of_a_burst_the_tokens_behind_the_end_are_not_delivered() -> None:
    observer = Kept()
    reporter, req = Reporter(observer), make_req()
    reporter.opened(req, 0.0, 0.0)
    run(reporter, [(1.0, [req])])
    req.output_ids += [1] * 2
    req.finished_reason, req.finished_len = FINISH_MATCHED_TOKEN(2), 3
    run(reporter, [(2.0, [req])])  # a burst of three, whose second is the last
    out = observer.records[0].out
    assert (out.tokens, out.gaps, out.max_gap_s, out.tpot_s) == (3, 1, 1.0, 0.5)


def test_a_request_ends_once() -> None:
    observer = Kept()
    reporter, req = Reporter(observer), make_req()
    reporter.opened(req, 0.0, 0.0)
    req.finished_reason = FINISH_MATCHED_TOKEN(2)
    run(reporter, [(1.0, [req]), (2.0, [req])])
    reporter.ended(req, 3.0, "abort")
    assert len(observer.records) == 1


def test_abort_of_a_waiting_request_is_judged_without_an_answer() -> None:
    observer = Kept()
    reporter, req = Reporter(observer), make_req()
    reporter.opened(req, 0.0, 0.0)
    req.slo_row = -1  # its row is gone already
    reporter.ended(req, 0.1)
    assert observer.records[0].finish == "abort"
    assert observer.records[0].out.tokens == 0
    assert req.finished_reason is None


def test_health_checks_count_nowhere() -> None:
    observer = Kept()
    reporter, req = Reporter(observer), make_req(rid=HEALTH_CHECK + "_1")
    reporter.opened(req, 0.0, 0.0)
    req.finished_reason = FINISH_LENGTH(1)
    run(reporter, [(1.0, [req])])
    assert not observer.records
    assert observer.snapshot(1.0)["totals"] == {}


def test_a_burst_is_one_delivery() -> None:
    observer = Kept()
    reporter, req = Reporter(observer), make_req()
    reporter.opened(req, 0.0, 0.0)
    run(reporter, [(1.0, [req])])
    req.output_ids += [1] * 3
    req.finished_reason = FINISH_LENGTH(5)
    run(reporter, [(2.0, [req])])
    out = observer.records[0].out
    assert (out.tokens, out.gaps, out.tpot_s) == (5, 1, 0.25)


def test_what_warms_the_prefix_for_several_answers_is_nobodys_request() -> None:
    observer = Kept()
    reporter, warm, own = Reporter(observer), make_req(0, most=0), make_req(1, most=0)
    warm.sampling_params.n = 4
    for req in (warm, own):
        reporter.opened(req, 0.0, 0.0)
        req.finished_reason = FINISH_LENGTH(0)
    clock.use(lambda: 0.1)
    reporter.streamed([warm, own])
    assert [record.rid for record in observer.records] == ["r"] and own.slo_slot == -1
    assert observer.snapshot(1.0)["totals"]["arrived"] == 1


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("The request queue is full.", "queue_full"),
        ("Request waiting timeout reached.", "waiting_timeout"),
        ("The request is aborted by a higher priority request.", "displaced"),
        ("something new", "other"),
    ],
)
def test_what_sglang_turns_away_is_noted_at_once_with_its_reason(message: str, reason: str) -> None:
    observer, sent = Kept(), []
    reporter, req = Reporter(observer), make_req()
    reporter.opened(req, 0.0, 0.0)
    sender = HearingSender(SimpleNamespace(send_output=lambda *given: sent.append(given)), reporter.refused)
    told = {"type": "abort", "status_code": HTTPStatus.SERVICE_UNAVAILABLE, "message": message}
    clock.use(lambda: 0.1)
    sender.send_output(AbortReq(rid="r", finished_reason=told), req)
    sender.send_output(SimpleNamespace(), None)
    assert len(sent) == 2
    totals = observer.snapshot(1.0)["totals"]
    assert (totals[f"shed_{reason}"], totals["missed_shed"], totals["judged"]) == (1, 1, 1)
    assert "attained" not in totals
    reporter.ended(req, 37.0)  # found missing later
    assert len(observer.records) == 1


def test_a_running_timeout_is_the_servers_doing() -> None:
    observer = Kept()
    reporter, req = Reporter(observer), make_req()
    reporter.opened(req, 0.0, 0.0)
    req.finished_reason = FINISH_ABORT("Request running timeout reached.", HTTPStatus.SERVICE_UNAVAILABLE)
    run(reporter, [(0.1, [req])])
    assert observer.snapshot(1.0)["totals"]["shed_running_timeout"] == 1


def test_trouble_while_reporting_is_counted_and_not_raised() -> None:
    observer = Kept()
    reporter, req = Reporter(observer), make_req()
    reporter.opened(req, 0.0, 0.0)
    req.output_ids = None
    reporter.streamed([req])
    assert observer.snapshot(1.0)["observer_errors"] == 1


def test_prompt_is_kept_only_when_asked() -> None:
    for asked in (False, True):
        observer = Kept()
        reporter, req = Reporter(observer, keep_text=asked), make_req()
        reporter.opened(req, 0.0, 0.0)
        reporter.ended(req, 1.0)
        assert observer.records[0].text == ("secret" if asked else None)


def test_finish_reasons_are_told_apart() -> None:
    assert finish_of(FINISH_LENGTH(1)) == "length"
    assert finish_of(FINISH_MATCHED_STR("x")) == "stop"
    assert finish_of(FINISH_ABORT()) == finish_of(None) == "abort"
    assert finish_of(FINISH_ABORT("long", HTTPStatus.BAD_REQUEST)) == "rejected"
    assert finish_of(FINISH_ABORT("busy", HTTPStatus.SERVICE_UNAVAILABLE)) == "shed"
    assert finish_of(FINISH_ABORT("bug", HTTPStatus.INTERNAL_SERVER_ERROR)) == "error"
