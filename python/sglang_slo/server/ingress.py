"""The ASGI layer before SGLang's endpoints: it carries headers and body to the door, and answers for it.

It sits innermost, behind authentication and decompression, around every POST and PUT, and changes nothing that passes.
The status line of an answer is held back until its first piece is there: by then the door has been passed, and a
request that was refused there gets its 400 (or 429, 503) instead, streaming or not, whatever SGLang made of the refusal.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from sglang_slo.config import SloConfig
from sglang_slo.server.body import MOST_LEVELS
from sglang_slo.server.errors import FieldError
from sglang_slo.server.refusals import Send, refuse, turn_away
from sglang_slo.server.verdicts import LastEvent
from sglang_slo.server.visit import VISIT, Message, Receive, Visit

App = Callable[[Message, Receive, Send], Awaitable[None]]

BACKGROUND = "/v1/responses"  # may answer, or begin its stream, before the model is asked


class Ingress:
    """ASGI middleware; `app` is what comes behind it."""

    def __init__(self, app: App, config: SloConfig) -> None:
        self.app = app
        self.config = config

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass on the request, and the answer unless the door has refused it."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            return await self.app(scope, receive, send)
        visit = Visit(_path(scope), scope["headers"], self.config)
        answer = Answer(visit, send)
        token = VISIT.set(visit)
        try:
            await self.app(scope, visit.listening(receive), answer.send)
        except Exception as error:
            if isinstance(error, RecursionError) and not visit.reached and visit.opens(MOST_LEVELS):
                # SGLang quotes the body that it refuses, and Python cannot
                visit.refused = FieldError("body", f"nested too deeply; need at most {MOST_LEVELS} levels")
            if not await answer.replaced():
                raise
        finally:
            VISIT.reset(token)
        return None


class Answer:
    """`send` of one answer, whose start waits for the first piece of the body."""

    def __init__(self, visit: Visit, send: Send) -> None:
        self._visit, self._send = visit, send
        self._held: Message | None = None
        self._last_event = LastEvent(visit)
        self._begun = self._replaced = False

    async def send(self, message: Message) -> None:
        """Send on; the first piece decides what the answer is."""
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            self._held = message
            return
        if self._held is not None:
            held, self._held = self._held, None
            self._look(held["status"])
            if await self.replaced():
                return
            self._begun = True
            await self._send(held)
        if message["type"] == "http.response.body" and message.get("more_body"):
            message = {**message, "body": self._last_event.before(message.get("body", b""))}
        await self._send(message)

    async def replaced(self) -> bool:
        """Answer for the door if it has refused and nothing has been sent. Returns whether it did."""
        visit = self._visit
        if self._begun or self._replaced:
            return self._replaced
        if visit.refused is not None:
            self._replaced = True
            await refuse(self._send, visit.path, visit.refused)
        elif visit.turned_away is not None:
            self._replaced = True
            await turn_away(self._send, visit.path, visit.turned_away, visit.config.queue_limit_s)
        return self._replaced

    def _look(self, status: int) -> None:
        # What SGLang refused by itself, before the door: perhaps for a limit that is no JSON to it (NaN, 1e999), and
        # the client is to read which. What it answered without the model, and only begins to work on.
        visit = self._visit
        if not visit.reached and (status == 400 or (status == 200 and visit.path == BACKGROUND)):
            try:
                visit.check(batches=visit.path != BACKGROUND)
            except FieldError as error:
                visit.refused = error


def _path(scope: Message) -> str:
    path: str = scope.get("path", "")
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path
