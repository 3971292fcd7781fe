"""A request on its way through: unchanged, to another replica while no answer has begun, and never in silence after."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

import relay
from choice import Ask
from relay import Begun, Lost, NobodyLeftError, Part, Ticket, answered

HEADERS = [
    ("content-type", "application/json"),
    ("x-slo-ttft-ms", "7"),
    ("tracestate", "slo=ttft:7"),
    ("host", "front"),
]
BODY = b'{"text":  "as it was", "slo": {"class": "chat"}}'
TICKET = Ticket(Ask("r", 1, 1), "POST", "/generate?x=1", HEADERS, BODY)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "PAUSE_S", 0.0)


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{any:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]
    finally:
        await runner.cleanup()


async def events(request: web.Request, parts: list[bytes], cut: bool) -> web.StreamResponse:
    """A stream; `cut`: its connection breaks off after these parts."""
    answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await answer.prepare(request)
    for part in parts:
        await answer.write(part)
    if cut:
        await asyncio.sleep(0.05)  # so that what was written has left
        assert request.transport is not None
        request.transport.abort()
    return answer


async def through(url: str) -> list[Part]:
    async with aiohttp.ClientSession() as session:
        return [part async for part in relay.relay(session, url, "a", TICKET)]


def test_body_path_and_headers_arrive_as_they_were_sent() -> None:
    came: dict[str, Any] = {}

    async def handler(request: web.Request) -> web.Response:
        came.update(body=await request.read(), path=request.raw_path, headers=request.headers.copy())
        return web.Response(status=429, body=b"no", headers={"retry-after": "3"})

    async def main() -> list[Part]:
        async with serving(handler) as url:
            return await through(url)

    head, body = asyncio.run(main())
    assert came["body"] == BODY and came["path"] == "/generate?x=1"
    assert came["headers"]["x-slo-ttft-ms"] == "7" and came["headers"]["tracestate"] == "slo=ttft:7"
    assert came["headers"]["host"] != "front"
    assert (
        isinstance(head, Begun)
        and head.status == 429
        and ("retry-after", "3") in [(name.lower(), value) for name, value in head.headers]
    )
    assert body == b"no"


def test_a_stream_passes_part_by_part() -> None:
    async def main() -> tuple[Part, Part, list[Part]]:
        go_on = asyncio.Event()

        async def handler(request: web.Request) -> web.StreamResponse:
            answer = await events(request, [b"data: 1\n\n"], cut=False)
            await go_on.wait()  # what follows is written once the first has come through
            await answer.write(b"data: [DONE]\n\n")
            return answer

        async with serving(handler) as url, aiohttp.ClientSession() as session:
            stream = relay.relay(session, url, "a", TICKET)
            head, part = await anext(stream), await anext(stream)
            go_on.set()
            return head, part, [rest async for rest in stream]

    head, part, rest = asyncio.run(main())
    assert isinstance(head, Begun) and head.status == 200
    assert (part, rest) == (b"data: 1\n\n", [b"data: [DONE]\n\n"])


def test_a_stream_that_breaks_off_ends_with_an_error_and_not_as_a_good_one() -> None:
    async def main() -> list[Part]:
        async def handler(request: web.Request) -> web.StreamResponse:
            return await events(request, [b"data: 1\n\n"], cut=True)

        async with serving(handler) as url:
            return await through(url)

    head, first, last = asyncio.run(main())
    assert isinstance(head, Begun) and first == b"data: 1\n\n" and isinstance(last, bytes)
    assert json.loads(last.strip().removeprefix(b"data: "))["error"]["type"] == "replica_lost"


def test_an_answer_has_not_begun_before_its_first_bytes() -> None:
    async def main() -> list[Part]:
        async def handler(request: web.Request) -> web.StreamResponse:
            return await events(request, [], cut=True)

        async with serving(handler) as url:
            return await through(url)

    (lost,) = asyncio.run(main())
    assert isinstance(lost, Lost) and lost.name == "a"


def test_half_of_an_answer_that_comes_whole_is_none() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "application/json", "content-length": "100"})
        await answer.prepare(request)
        await answer.write(b'{"half":')
        assert request.transport is not None
        request.transport.abort()
        return answer

    async def main() -> list[Part]:
        async with serving(handler) as url:
            return await through(url)

    (lost,) = asyncio.run(main())
    assert isinstance(lost, Lost)


def sender(answers: dict[str, Part | Exception], went: list[str]) -> relay.Send:
    """Sends to the first replica, by name, that was not tried."""

    async def send(ticket: Ticket) -> AsyncIterator[Part]:
        name = next((n for n in answers if n not in ticket.tried), next(iter(answers)))
        went.append(name)
        found = answers[name]
        if isinstance(found, Exception):
            raise found
        yield found
        if isinstance(found, Begun):
            yield b"rest"

    return send


def test_a_request_whose_answer_has_not_begun_goes_to_another_replica() -> None:
    async def main() -> tuple[Begun, list[Part]]:
        head, rest = await answered(sender({"a": Lost("a", "reset"), "b": Begun(200, [])}, went), TICKET)
        return head, [part async for part in rest]

    went: list[str] = []
    assert asyncio.run(main()) == (Begun(200, []), [b"rest"])
    assert went == ["a", "b"]


def test_tries_are_bounded_and_the_reasons_are_told() -> None:
    went: list[str] = []
    with pytest.raises(NobodyLeftError, match=r"reset.*RuntimeError: the actor died"):
        asyncio.run(
            answered(sender({"a": Lost("a", "reset"), "b": RuntimeError("the actor died")}, went), TICKET)
        )
    assert len(went) == relay.MOST_TRIES


def test_no_try_begins_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    went: list[str] = []
    monkeypatch.setattr(relay, "RETRY_S", -1.0)
    with pytest.raises(NobodyLeftError):
        asyncio.run(answered(sender({"a": Lost("a", "reset")}, went), TICKET))
    assert went == ["a"]


def test_a_replica_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "BEGIN_S", 0.01)

    async def send(ticket: Ticket) -> AsyncIterator[Part]:
        await asyncio.Event().wait()
        yield b""

    with pytest.raises(NobodyLeftError, match="TimeoutError"):
        asyncio.run(answered(send, TICKET))
