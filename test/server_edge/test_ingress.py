"""The ASGI layer: it hands on everything, once, and answers bad limits itself."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sglang_slo.config import SloConfig
from sglang_slo.core.slo import SloClass
from sglang_slo.server.ingress import Ingress

CONFIG = SloConfig(classes={"chat": SloClass(500, 50)})
PATHS = ["/generate", "/v1/completions", "/v1/chat/completions"]


class Behind:
    """An app that notes what reaches it, answers in two pieces, then waits for the client to leave."""

    def __init__(self) -> None:
        self.body, self.scope, self.left = b"", {}, False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = scope
        while True:
            message = await receive()
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})
        self.left = (await receive())["type"] == "http.disconnect"


def call(path: str, pieces: list[bytes], headers: dict[str, str], root: str = "") -> tuple[Behind, list[Any]]:
    """What reached the app behind, and what was sent to the client."""
    behind, sent = Behind(), []
    last = len(pieces) - 1
    messages = [{"type": "http.request", "body": b, "more_body": i < last} for i, b in enumerate(pieces)]
    messages.append({"type": "http.disconnect"})

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(k.encode(), v.encode()) for k, v in {"content-length": "1", **headers}.items()]
    scope = {"type": "http", "method": "POST", "path": path, "root_path": root, "headers": raw}
    asyncio.run(Ingress(behind, CONFIG)(scope, receive, send))
    return behind, sent


@pytest.mark.parametrize("path", PATHS)
def test_limits_arrive_and_the_answer_passes_piece_by_piece(path: str) -> None:
    body = b'{"text": "a", "slo": {"class": "chat"}}'
    behind, sent = call(path, [body[:9], body[9:]], {})
    assert b'"ttft_ms":500' in behind.body and b'"received_s"' in behind.body
    assert (b"content-length", str(len(behind.body)).encode()) in behind.scope["headers"]
    assert len([k for k, _ in behind.scope["headers"] if k == b"content-length"]) == 1
    assert [m.get("body") for m in sent] == [None, b"a", b"b"] and behind.left


@pytest.mark.parametrize("path", PATHS)
def test_a_request_without_limits_is_not_touched(path: str) -> None:
    behind, sent = call(path, [b'{"text":', b' "a"}'], {"x-other": "1"})
    assert behind.body == b'{"text": "a"}' and behind.left and len(sent) == 3
    assert (b"content-length", b"1") in behind.scope["headers"]


@pytest.mark.parametrize("path", PATHS)
def test_a_bad_limit_never_reaches_the_app(path: str) -> None:
    behind, sent = call(path, [b"{}"], {"x-slo-ttft-ms": "-1"})
    assert not behind.scope and sent[0]["status"] == 400
    answer = json.loads(sent[1]["body"])
    assert "x-slo-ttft-ms" in answer["error"]["message"] and answer["error"]["param"] == "x-slo-ttft-ms"
    assert (path == "/generate") or "x-slo-ttft-ms" in answer["message"]


@pytest.mark.parametrize("path", ["/encode", "/v1/embeddings", "/health", "/generate/x"])
def test_other_endpoints_are_left_alone(path: str) -> None:
    body = b'{"slo": "nonsense"}'
    behind, _ = call(path, [body], {"x-slo-ttft-ms": "nonsense"})
    assert behind.body == body


def test_a_server_behind_a_prefix_reads_limits_too() -> None:
    _, sent = call("/api/generate", [b"{}"], {"x-slo-class": "gold"}, root="/api")
    assert sent[0]["status"] == 400


def test_a_client_that_leaves_before_its_body_is_sent_is_forgotten() -> None:
    behind, sent = Behind(), []

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    asyncio.run(Ingress(behind, CONFIG)(scope, receive, sent.append))  # type: ignore[arg-type]
    assert not behind.scope and not sent
