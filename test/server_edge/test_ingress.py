"""The ASGI layer: it hands on everything, once, and answers for the door where that has refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_slo.config import SloConfig
from sglang_slo.core.slo import SloClass
from sglang_slo.server import refusals
from sglang_slo.server.door import Door
from sglang_slo.server.ingress import Ingress
from sglang_slo.server.verdicts import heard

CONFIG = SloConfig(classes={"chat": SloClass(500, 50)}, queue_limit_s=12.3)
PATHS = [
    "/generate",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
    "/api/chat",
    "/vertex_generate",
    "/new",
]
FULL = {"type": "abort", "status_code": 503, "message": refusals.message(refusals.QUEUE, "too long")}
HOPELESS = {"type": "abort", "status_code": 503, "message": refusals.message(refusals.HOPELESS, "too late")}


class Behind:
    """SGLang in small: reads the body, begins its answer, asks the model, answers in two pieces, awaits the end."""

    def __init__(self, status: int = 200, asks: bool = True, ends: Any = None, late: bool = True) -> None:
        self.status, self.asks, self.ends, self.late = status, asks, ends, late
        self.body, self.left = b"", False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if self.late:
            await self._model()
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"x", b"y")]})
        if not self.late:
            try:
                await self._model()
            except ValueError as error:  # as SGLang's streams do
                await send({"type": "http.response.body", "body": str(error).encode()})
                return
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})
        self.left = (await receive())["type"] == "http.disconnect"

    async def _model(self) -> None:
        if self.asks:
            Door(CONFIG).hook(lambda *_: None, None, GenerateReqInput(text="a"))
        if self.ends is not None:
            await refusals.noted(self._nothing, None, {"meta_info": {"finish_reason": self.ends}})

    async def _nothing(self, *_: Any) -> None:
        return None


def call(
    behind: Behind, path: str, pieces: list[bytes], headers: dict[str, str], root: str = ""
) -> list[Any]:
    """What was sent to the client."""
    sent: list[Any] = []
    last = len(pieces) - 1
    messages = [{"type": "http.request", "body": b, "more_body": i < last} for i, b in enumerate(pieces)]
    messages.append({"type": "http.disconnect"})

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(k.encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "root_path": root, "headers": raw}
    asyncio.run(Ingress(behind, CONFIG)(scope, receive, send))
    return sent


@pytest.mark.parametrize("headers", [{}, {"x-slo-class": "chat"}])
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_a_good_request_and_its_answer_pass_piece_by_piece(
    path: str, late: bool, headers: dict[str, str]
) -> None:
    behind = Behind(late=late)
    sent = call(behind, path, [b'{"text":', b' "a"}'], headers)
    assert behind.body == b'{"text": "a"}' and behind.left
    assert [m.get("body") for m in sent] == [None, b"a", b"b"]
    assert sent[0]["status"] == 200 and sent[0]["headers"] == [(b"x", b"y")]


@pytest.mark.parametrize("late", [True, False], ids=["raises", "streams its error"])
@pytest.mark.parametrize("path", PATHS)
def test_a_bad_limit_is_a_400_that_names_the_field(path: str, late: bool) -> None:
    sent = call(Behind(late=late), path, [b"{}"], {"x-slo-ttft-ms": "-1"})
    assert [m["type"] for m in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 400
    error = json.loads(sent[1]["body"])["error"]
    assert "x-slo-ttft-ms" in (error if path == "/api/chat" else error["message"])


@pytest.mark.parametrize(
    "body", [b'{"slo": {"ttft_ms": NaN}}', b'{"slo": {"\\ud800": 1}}', b'{"slo": {"ttft_ms": 0}}']
)
def test_what_sglang_refuses_before_the_door_is_told_by_name_too(body: bytes) -> None:
    sent = call(Behind(status=400, asks=False), "/generate", [body], {})
    assert sent[0]["status"] == 400 and b"slo." in sent[1]["body"]


@pytest.mark.parametrize("limits", [b'{"ttft_ms": 0}', b'[{"ttft_ms": 5}]'])
def test_an_answer_that_comes_before_the_model_is_asked_is_refused_as_well(limits: bytes) -> None:
    sent = call(Behind(asks=False), "/v1/responses", [b'{"slo": ' + limits + b', "background": true}'], {})
    assert sent[0]["status"] == 400


class Quotes(Behind):
    """It reads the body, and fails at telling what is wrong with it."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        raise RecursionError


def test_a_recursion_that_the_body_did_not_cause_is_no_fault_of_the_client() -> None:
    with pytest.raises(RecursionError):
        call(Quotes(), "/generate", [b"{}"], {})


@pytest.mark.parametrize("path", PATHS)
def test_a_body_too_deep_to_be_quoted_is_a_400(path: str) -> None:
    start, body = call(Quotes(), path, [b"[" * 300, b"[" * 300], {})
    assert start["status"] == 400 and b"nested too deeply" in body["body"]


@pytest.mark.parametrize("status", [200, 400, 500])
def test_what_does_not_ask_the_model_is_left_alone(status: int) -> None:
    sent = call(Behind(status=status, asks=False), "/v1/tokenize", [b"{}"], {"x-slow": "1"})
    assert [m.get("body") for m in sent] == [None, b"a", b"b"] and sent[0]["status"] == status


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("ends", "status", "reason"),
    [
        (FULL, 503, b"queue"),
        (HOPELESS, 429, b"hopeless"),
        ({**FULL, "message": "broken"}, 503, b"overloaded"),
    ],
)
def test_a_request_turned_away_is_told_when_to_retry_and_why(
    ends: Any, status: int, reason: bytes, path: str, late: bool
) -> None:
    sent = call(Behind(ends=ends, late=late), path, [b"{}"], {})
    headers = dict(sent[0]["headers"])
    assert sent[0]["status"] == status and len(sent) == 2
    assert headers[b"retry-after"] == b"13" and headers[b"x-slo-refused-reason"] == reason


@pytest.mark.parametrize("ends", [{"type": "abort", "status_code": 400, "message": "m"}, {"type": "stop"}])
def test_other_ends_pass_untouched(ends: Any) -> None:
    assert call(Behind(ends=ends), "/generate", [b"{}"], {})[0]["status"] == 200


def test_a_server_behind_a_prefix_answers_in_the_same_form() -> None:
    sent = call(Behind(), "/llm/v1/messages", [b"{}"], {"x-slo-ttft-ms": "-1"}, root="/llm")
    assert json.loads(sent[1]["body"])["type"] == "error"


def test_a_client_that_leaves_before_its_body_is_sent_is_forgotten() -> None:
    sent: list[Any] = []

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    asyncio.run(Ingress(Behind(), CONFIG)(scope, gone, send))
    assert not sent


ENDS = {
    b'data: {"id": "1", "object": "chat.completion.chunk", "choices": []}\n\n': b"data: [DONE]\n\n",
    b'event: message_delta\ndata: {"type": "message_delta"}\n\n': b"event: message_stop\ndata: {}\n\n",
    b'data: {"text": "a", "meta_info": {"slo": {}}}\n\n': b"data: [DONE]\n\n",  # /generate: has it
}


@pytest.mark.parametrize("verdicts", [[], [{"attained": True}], [{"attained": True}, {"attained": False}]])
@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("last", ENDS)
def test_a_stream_tells_the_verdict_in_one_more_event_to_those_who_ask(
    last: bytes, asked: bool, verdicts: list[Any]
) -> None:
    async def behind(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        Door(CONFIG).hook(lambda *_: None, None, GenerateReqInput(text="a"))
        for verdict in verdicts:
            heard(verdict)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (b"data: {}\n\n", last, ENDS[last]):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    headers = {"x-slo-verdict": "true", "x-slo-class": "chat"} if asked else {"x-slo-class": "chat"}
    text = b"".join(m.get("body", b"") for m in call(behind, "/v1/any", [b"{}"], headers))
    plain = b"data: {}\n\n" + last + ENDS[last]
    if not asked or not verdicts or b"meta_info" in last:
        assert text == plain
        return
    begin, end = len(plain) - len(ENDS[last]), len(text) - len(ENDS[last])
    assert text[:begin] + text[end:] == plain  # just before the end
    event = json.loads(text[begin:end].partition(b"data: ")[2])
    told = event["slo"] if event.get("type") == "slo" else event["metadata"]["slo"]
    assert told == (verdicts[0] if len(verdicts) == 1 else verdicts)
    assert event.get("choices", []) == []
