"""A request that was shed gets a plain HTTP 503 with Retry-After, streaming or not.

SGLang answers a refused streaming request with status 200 and the refusal as its first event. Here the status line
is held back until the first piece of the body is there; if that piece is a refusal, the answer becomes a 503.
Only used with a queue limit: without one nothing is ever shed.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


def shed_answers(send: Send, queue_limit_s: float) -> Send:
    """`send` that turns refusals into 503 and names a time to retry, seconds: after that long the line has moved on."""
    retry_after = (b"retry-after", str(max(math.ceil(queue_limit_s), 1)).encode())
    held: Message | None = None
    refused = False

    async def sending(message: Message) -> None:
        nonlocal held, refused
        if refused:
            return
        if message["type"] == "http.response.start":
            if message["status"] == 503:
                message = {**message, "headers": [*message.get("headers", []), retry_after]}
            held = message
            return
        start, held = held, None
        if start is None:
            return await send(message)
        body = message.get("body", b"")
        if start["status"] != 200 or not _refusal(body):
            await send(start)
            return await send(message)
        refused = True
        error = {"message": "the queue is too long: try again later", "type": "overloaded", "code": 503}
        payload = orjson.dumps({"error": error})
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(payload)).encode())]
        await send({"type": "http.response.start", "status": 503, "headers": [*headers, retry_after]})
        await send({"type": "http.response.body", "body": payload})

    return sending


def _refusal(first: bytes) -> bool:
    """True if the first event of a stream says 503: as a finish reason (native) or as an error (OpenAI)."""
    if not first.startswith(b"data: {"):
        return False
    try:
        event = orjson.loads(first[len(b"data: ") :].split(b"\n", 1)[0])
    except ValueError:
        return False
    reason = (event.get("meta_info") or {}).get("finish_reason") or {}
    error = event.get("error") or {}
    codes = [
        part.get(key) for part in (reason, error) if isinstance(part, dict) for key in ("status_code", "code")
    ]
    return 503 in codes
