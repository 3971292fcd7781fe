"""Deadlines in: a thin ASGI layer before SGLang's endpoints that reads limits and writes `custom_params`.

It sits innermost, behind authentication and decompression, on /generate, /v1/completions and
/v1/chat/completions. A bad limit gets HTTP 400 naming the field, and SGLang never sees the request. A
request that brings no limit passes through untouched: the scheduler applies the server's defaults itself
(`limits.slo_of`). Responses, streaming or not, are not touched at all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from sglang_slo.config import SloConfig
from sglang_slo.server.limits import LimitError, parse_headers
from sglang_slo.server.rewrite import rewrite
from sglang_slo.server.shed import shed_answers

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

NATIVE = "/generate"
OPENAI = ("/v1/completions", "/v1/chat/completions")


class Ingress:
    """ASGI middleware; `app` is what comes behind it."""

    def __init__(self, app: App, config: SloConfig) -> None:
        self.app = app
        self.config = config

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass on what is not ours; else read the body and rewrite it, or answer 400."""
        path = _path(scope)
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT") or path not in (NATIVE, *OPENAI):
            return await self.app(scope, receive, send)
        body = await _read(receive)
        if body is None:  # the client left before it had sent everything
            return None
        try:
            headers = parse_headers((k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"])
            new = rewrite(body, headers, native=path == NATIVE, config=self.config)
        except LimitError as error:
            return await _refuse(error, native=path == NATIVE, send=send)
        if new is not body:
            scope = {**scope, "headers": _with_length(scope["headers"], len(new))}
        if self.config.queue_limit_s is not None:
            send = shed_answers(send, self.config.queue_limit_s)
        return await self.app(scope, _replay(new, receive), send)


def _path(scope: Message) -> str:
    path: str = scope.get("path", "")
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


async def _read(receive: Receive) -> bytes | None:
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    # The body once, then whatever the client does next: SGLang listens for its leaving.
    sent = False

    async def next_message() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [(k, v) for k, v in headers if k.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(length).encode())]


async def _refuse(error: LimitError, native: bool, send: Send) -> None:
    detail = {
        "object": "error",
        "message": str(error),
        "type": "BadRequestError",
        "param": error.field,
        "code": 400,
    }
    # SGLang's /generate nests its errors, its OpenAI endpoints do not; OpenAI's own clients read both.
    payload = orjson.dumps({"error": detail} if native else {**detail, "error": detail})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(payload)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": payload})
