"""One HTTP request on its way in: what it carries to the door (door.py), and what the door says of it.

SGLang's endpoints pass on neither headers nor fields of the body that they do not know. The ASGI layer
(ingress.py) keeps both in a `Visit`, which the door finds in a context variable: in the task that serves the
request and in all that SGLang starts from it. Nothing is read from it until a request for the model is made.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sglang_slo import clock
from sglang_slo.config import SloConfig
from sglang_slo.server.body import SILENT, Said, read_body
from sglang_slo.server.errors import FieldError
from sglang_slo.server.headers import OBJECTIVES, PREFIXES, parse_headers, parse_objective, parse_tracestate
from sglang_slo.server.limits import LimitError, Limits, first_of, parse, resolve

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

_OURS = tuple(p.encode() for p in (*PREFIXES, *OBJECTIVES, "tracestate"))


@dataclass(frozen=True)
class Refusal:
    """A request that was turned away. `reason`: one word; `status`: of the HTTP answer."""

    status: int
    reason: str
    message: str


@dataclass
class Visit:
    """See the module. `refused`: why the answer has to be a 400; `turned_away`: why a 429 or 503."""

    path: str
    headers: list[tuple[bytes, bytes]]
    config: SloConfig
    reached: bool = False  # the door, at least once
    refused: FieldError | None = None
    turned_away: Refusal | None = None
    tell: bool = False  # the verdict was asked for
    verdicts: list[dict[str, Any]] = field(default_factory=list)  # in the order in which answers ended
    _arrived_s: float | None = None
    _chunks: list[bytes] = field(default_factory=list)

    def opens(self, levels: int) -> bool:
        """Whether the body, as far as it is kept, opens more lists and objects than that: only then can it be so deep."""
        return sum(chunk.count(b"[") + chunk.count(b"{") for chunk in self._chunks) > levels

    def listening(self, receive: Receive) -> Receive:
        """`receive` that keeps the body as it passes, and notes when it was complete."""
        keep = not any(k == b"content-type" and v.startswith(b"multipart/") for k, v in self.headers)

        async def next_message() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                if keep and message.get("body"):
                    self._chunks.append(message["body"])
                if not message.get("more_body", False):
                    self._arrived_s = clock.now()
            return message

        return next_message

    def arrived_s(self) -> float:
        """When the request for the model arrived: the first with the body, later ones of the same visit now."""
        arrived, self._arrived_s = self._arrived_s, None
        return clock.now() if arrived is None else arrived

    @cached_property
    def said(self) -> Said:
        """What the body says. Raises LimitError."""
        body = b"".join(self._chunks)
        self._chunks.clear()
        return read_body(body, self.config) if body else SILENT

    @cached_property
    def beside(self) -> Limits:
        """All that the request says besides `slo` in its body, strongest first (see body.py). Raises LimitError."""
        ours = [
            (k.decode("latin-1"), v.decode("latin-1"))
            for k, v in self.headers
            if k.lower().replace(b"_", b"-").startswith(_OURS)
        ]
        if not ours and self.said is SILENT:
            return first_of(iter(()))
        return first_of(
            iter(
                (
                    self.said.labels,
                    parse_headers(ours),
                    parse_tracestate(ours),
                    self.said.tier,
                    parse_objective(ours, self.config),
                )
            )
        )

    def check(self, batches: bool = True) -> None:
        """Raises LimitError if the limits cannot be used, as far as that can be told without SGLang.

        `batches`: the endpoint may be asked for several prompts at once.
        """
        own, params = self.said.own, self.said.params
        if params is not None:
            resolve(parse(params, "custom_params.slo").over(self.beside), self.config)
        if isinstance(own, list) and not batches:
            raise LimitError("slo", f"need one object; got a list of {len(own)}")
        for i, row in enumerate(own if isinstance(own, list) else [own]):
            where = f"slo[{i}]" if isinstance(own, list) else "slo"
            resolve(parse(row, where).over(self.beside), self.config)


VISIT: ContextVar[Visit | None] = ContextVar("slo_visit", default=None)
