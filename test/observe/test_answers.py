"""A verdict reaches the client in `meta_info.slo` and leaves the finish reason as it was."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_slo.observe.answers import attach, install, judged_answers, move, span_attributes

sglang = pytest.importorskip("sglang.srt.managers.schedule_batch")
VERDICT = {"attained": True, "missed": None, "ttft_ms": 12.5}


def reasons() -> list[Any]:
    return [
        sglang.FINISH_LENGTH(5),
        sglang.FINISH_MATCHED_TOKEN(2),
        sglang.FINISH_MATCHED_STR("\n"),
        sglang.FINISH_ABORT("gone"),
    ]


@pytest.mark.parametrize("number", range(4))
def test_verdict_travels_with_any_finish_reason_on_the_wire(number: int) -> None:
    import msgspec
    from sglang.srt.managers.io_struct import FinishReasonDict

    reason = reasons()[number]
    plain, req = reason.to_json(), SimpleNamespace(finished_reason=reason)
    attach(req, VERDICT)
    assert isinstance(req.finished_reason, type(reason))
    wire = msgspec.msgpack.decode(
        msgspec.msgpack.encode(req.finished_reason.to_json()), type=FinishReasonDict
    )
    meta_info: dict[str, Any] = {"finish_reason": wire}
    move(meta_info)
    assert meta_info == {"finish_reason": plain, "slo": VERDICT}


def test_a_traced_requests_span_has_class_limits_verdict_and_preemptions() -> None:
    told = {**VERDICT, "class": "chat", "tbt_limit_ms": None, "attained_by_rule": {"mean": True}}
    told["missed"] = ["gap"]
    out = SimpleNamespace(
        finished_reasons=[{"type": "stop", "slo": json.dumps(told)}, None, {"type": "stop"}]
    )
    out.retraction_counts = [2, 0, 0]

    def attributes(i: int) -> Any:
        return span_attributes(lambda *_: {"theirs": 1}, None, None, out, i)

    assert attributes(0) == {
        "theirs": 1,
        "slo.class": "chat",
        "slo.attained": True,
        "slo.missed": ["gap"],
        "slo.ttft_ms": 12.5,
        "slo.attained_by_rule.mean": True,
        "slo.preemptions": 2,
    }
    assert attributes(1) == attributes(2) == {"theirs": 1}


def test_requests_that_share_a_reason_keep_their_own_verdicts() -> None:
    shared = sglang.FINISH_ABORT()
    reqs = [SimpleNamespace(finished_reason=shared) for _ in range(2)]
    for i, req in enumerate(reqs):
        attach(req, {"i": i})
    assert [json.loads(req.finished_reason.to_json()["slo"])["i"] for req in reqs] == [0, 1]
    assert "slo" not in shared.to_json()


@pytest.mark.parametrize("reason", [None, {"type": "stop"}])
def test_answers_without_a_verdict_are_left_alone(reason: Any) -> None:
    meta_info = {"finish_reason": reason, "id": "r"}
    move(meta_info)
    assert meta_info == {"finish_reason": reason, "id": "r"}


def test_wrapped_answers_close_what_they_wrap_when_the_client_leaves() -> None:
    closed, told = [], []

    async def answers() -> AsyncIterator[dict[str, Any]]:
        try:
            for _ in range(3):
                yield {"meta_info": {"finish_reason": {"type": "stop", "slo": "{}"}}}
        finally:
            closed.append(True)

    async def client() -> None:
        stream = judged_answers(answers(), told.append)
        first = await stream.__anext__()
        assert first["meta_info"] == {"finish_reason": {"type": "stop"}, "slo": {}}
        await stream.aclose()  # type: ignore[attr-defined]
        assert closed and told == [{}]

    asyncio.run(client())


def test_install_wraps_sglangs_answers_once() -> None:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    original = TokenizerManager._wait_one_response
    try:
        install(print)
        wrapped = TokenizerManager._wait_one_response
        install(print)
        assert TokenizerManager._wait_one_response is wrapped is not original
    finally:
        TokenizerManager._wait_one_response = original


def test_sglang_is_asked_when_it_is_called_not_when_its_answer_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    asked = []

    async def answers() -> AsyncIterator[dict[str, Any]]:
        yield {"meta_info": {}}

    def wait_one_response(manager: Any, obj: Any, request: Any = None) -> AsyncIterator[dict[str, Any]]:
        asked.append((obj, request))  # here SGLang finds the request's state, which ends with the request
        return answers()

    monkeypatch.setattr(TokenizerManager, "_wait_one_response", wait_one_response)
    install(print)
    TokenizerManager._wait_one_response(None, "obj", request="request")
    assert asked == [("obj", "request")]
