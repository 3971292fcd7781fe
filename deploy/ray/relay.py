"""Passes one request on to a server and its answer back, and tries another replica while no answer has begun.

An answer begins with the first bytes of a stream, or with the last of an answer that comes whole: until then nothing went to
the client, and the request can go to another replica. After that a stream that breaks off ends with an error event, which
clients of SGLang and of OpenAI's API take for one, and without the event that ends a good stream.

Always: what the client sent arrives unchanged, body and headers, those of the connection aside; at most `MOST_TRIES` tries,
none after `RETRY_S`, none longer than `BEGIN_S` without an answer.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

import aiohttp

from choice import Ask

MOST_TRIES = 4
RETRY_S = 60.0  # from arrival: no try begins later
PAUSE_S = 0.3  # before the second try; then twice as long each time
BEGIN_S = 1800.0  # without any answer
OF_THE_CONNECTION = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"),
    *("transfer-encoding", "upgrade", "host", "content-length"),
}
Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Ticket:
    """A request on its way. `tried`: replicas that were lost with it."""

    ask: Ask
    method: str
    path: str  # with its query
    headers: Pairs
    body: bytes
    tried: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Begun:
    """An answer begins."""

    status: int
    headers: Pairs


@dataclass(frozen=True)
class Lost:
    """A replica that did not begin to answer."""

    name: str
    reason: str


class NobodyLeftError(RuntimeError):
    """No replica began to answer; the message has the reasons."""


Part = Begun | Lost | bytes
Send = Callable[[Ticket], AsyncIterator[Part]]


def passed_on(headers: Pairs) -> list[tuple[str, str]]:
    """The headers without those of the connection."""
    return [(name, value) for name, value in headers if name.lower() not in OF_THE_CONNECTION]


async def relay(session: aiohttp.ClientSession, url: str, name: str, ticket: Ticket) -> AsyncIterator[Part]:
    """A server's answer: `Begun`, then its bytes; or `Lost`."""
    begun = events = False
    try:
        async with session.request(
            ticket.method,
            url + ticket.path,
            data=ticket.body or None,
            headers=passed_on(ticket.headers),
            allow_redirects=False,
        ) as answer:
            events = answer.content_type == "text/event-stream"
            head = Begun(answer.status, passed_on(list(answer.headers.items())))
            if not events:
                whole = await answer.read()
                begun = True
                yield head
                yield whole
                return
            async for part in answer.content.iter_any():
                if not begun:
                    begun = True
                    yield head
                yield part
            if not begun:
                begun = True
                yield head
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        if begun:
            yield broken(name, error)
        else:
            yield Lost(name, repr(error))


def broken(name: str, error: BaseException) -> bytes:
    """The event that ends a stream whose replica was lost on the way."""
    text = f"replica {name} was lost after the answer had begun: {error!r}"
    told = {"error": {"message": text, "type": "replica_lost", "code": 502}}
    return b"\n\ndata: " + json.dumps(told).encode() + b"\n\n"


async def answered(send: Send, ticket: Ticket) -> tuple[Begun, AsyncIterator[Part]]:
    """The answer of the first replica that begins one, and the rest of it. Raises NobodyLeftError."""
    start_s, pause_s, reasons = time.monotonic(), PAUSE_S, []
    for _ in range(MOST_TRIES):
        stream = send(ticket)
        try:
            first: Part = await asyncio.wait_for(anext(stream), BEGIN_S)
        except (StopAsyncIteration, asyncio.TimeoutError) as error:
            first = Lost("", repr(error))
        except Exception as error:  # Ray's own: the actor died, and Ray knows which
            first = Lost("", f"{type(error).__name__}: {str(error)[:200]}")
        if isinstance(first, Begun):
            return first, stream
        assert isinstance(first, Lost)
        reasons.append(f"{first.name or 'a replica'}: {first.reason}")
        ticket = replace(ticket, tried=ticket.tried | {first.name} - {""})
        if time.monotonic() - start_s + pause_s > RETRY_S:
            break
        await asyncio.sleep(pause_s)
        pause_s *= 2
    raise NobodyLeftError("; ".join(reasons))
