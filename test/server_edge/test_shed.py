"""A refusal becomes a 503 that names a time to retry; every other answer passes untouched."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sglang_slo.server.shed import shed_answers

NATIVE = b'data: {"text":"","meta_info":{"finish_reason":{"type":"abort","status_code":503}}}\n\n'
OPENAI = b'data: {"error":{"message":"full","code":503}}\n\n'


def _through(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def run() -> None:
        sending = shed_answers(send, 12.3)
        for message in messages:
            await sending(message)

    asyncio.run(run())
    return sent


def _start(status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": []}


def _body(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


@pytest.mark.parametrize("event", [NATIVE, OPENAI])
def test_refused_stream_is_a_503_with_retry_after(event: bytes) -> None:
    sent = _through(_start(), _body(event), _body(b"data: [DONE]\n\n", False))
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"13") in sent[0]["headers"]
    assert len(sent) == 2, "nothing follows a refusal"


def test_plain_503_gets_a_time_to_retry() -> None:
    sent = _through(_start(503), _body(b"{}", False))
    assert (b"retry-after", b"13") in sent[0]["headers"]


@pytest.mark.parametrize("body", [b'data: {"text":"hi"}\n\n', b"data: [DONE]\n\n", b"{}", b"data: {broken"])
def test_other_answers_pass_untouched(body: bytes) -> None:
    messages = [_start(), _body(body), _body(b"more", False)]
    assert _through(*messages) == messages
