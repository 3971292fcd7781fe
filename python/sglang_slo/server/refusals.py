"""The answer to a request that was refused or turned away, in the form that clients of its endpoint read.

A scheduler that turns a request away aborts it with status 503 and a message made by `message`; here that becomes
429 for what cannot keep its limits any more and 503 for a queue that is too long, with Retry-After and the reason
in `x-slo-refused-reason`, for streams as well: SGLang would send those with status 200.
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from sglang_slo.server.errors import FieldError
from sglang_slo.server.visit import VISIT, Message, Refusal

Send = Callable[[Message], Awaitable[None]]

QUEUE, HOPELESS = "queue", "hopeless"  # reasons of ours
STATUS = {QUEUE: 503, HOPELESS: 429}
UNAVAILABLE = 503
OTHER = "overloaded"  # the reason where SGLang itself gives up
RETRY_AFTER_S = 1.0  # where no queue limit says how soon the queue has moved on
_MARK = "turned away ("

VERTEX = os.environ.get("AIP_PREDICT_ROUTE", "/vertex_generate")
OLLAMA = (
    os.environ.get("SGLANG_OLLAMA_CHAT_ROUTE", "/api/chat"),
    os.environ.get("SGLANG_OLLAMA_GENERATE_ROUTE", "/api/generate"),
)
NESTED = ("/generate", "/encode", "/classify", VERTEX)
ANTHROPIC = {400: "invalid_request_error", 429: "rate_limit_error", 503: "overloaded_error"}
OPENAI = {400: "BadRequestError", 429: "RateLimitError", 503: "ServiceUnavailableError"}


def message(reason: str, text: str) -> str:
    """The message of an abort that turns a request away for `reason` (QUEUE, HOPELESS), for a client to read."""
    return f"{_MARK}{reason}): {text}"


def refusal_of(text: str) -> Refusal:
    """What an abort with status 503 says."""
    reason = QUEUE if "queue" in text else OTHER  # as in SGLang's own words
    if text.startswith(_MARK):
        reason = text[len(_MARK) :].partition(")")[0]
    return Refusal(STATUS.get(reason, UNAVAILABLE), reason, text)


async def noted(
    original: Callable[..., Awaitable[Any]], manager: Any, out: Any, *args: Any, **kwargs: Any
) -> Any:
    """SGLang's `_handle_abort_finish_reason`, which notes for the HTTP answer that a request was turned away."""
    reason, visit = out["meta_info"]["finish_reason"], VISIT.get()
    if visit is not None and reason.get("type") == "abort" and reason.get("status_code") == UNAVAILABLE:
        visit.turned_away = refusal_of(str(reason.get("message", "")))
    return await original(manager, out, *args, **kwargs)


def payload(path: str, status: int, text: str, field: str | None) -> bytes:
    """The body of an error answer on `path`."""
    if path in OLLAMA:
        return orjson.dumps({"error": text})
    if path.startswith("/v1/messages"):
        return orjson.dumps({"type": "error", "error": {"type": ANTHROPIC[status], "message": text}})
    detail = {"object": "error", "message": text, "type": OPENAI[status], "param": field, "code": status}
    # SGLang's own endpoints nest their errors, its OpenAI endpoints do not; OpenAI's own clients read both.
    nested = path in NESTED or path.startswith("/v1/responses")
    return orjson.dumps({"error": detail} if nested else {**detail, "error": detail})


async def refuse(send: Send, path: str, error: FieldError) -> None:
    """Answer 400, naming the field."""
    await _answer(send, 400, payload(path, 400, str(error), error.field), [])


async def turn_away(send: Send, path: str, refusal: Refusal, queue_limit_s: float | None) -> None:
    """Answer 429 or 503, naming a time to retry: after the queue limit the queue has moved on."""
    body = payload(path, refusal.status, refusal.message, None)
    await _answer(send, refusal.status, body, turned_away_headers(refusal, queue_limit_s))


def turned_away_headers(refusal: Refusal, queue_limit_s: float | None) -> list[tuple[bytes, bytes]]:
    """The headers of an answer that turns a request away."""
    wait_s = max(math.ceil(queue_limit_s or RETRY_AFTER_S), 1)
    reason = refusal.reason if refusal.reason.isascii() and refusal.reason.isidentifier() else OTHER
    return [(b"retry-after", str(wait_s).encode()), (b"x-slo-refused-reason", reason.encode())]


async def _answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    plain = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*plain, *headers]})
    await send({"type": "http.response.body", "body": body})
