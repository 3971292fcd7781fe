"""Verdicts in the answers of OpenAI's and Anthropic's APIs, wherever these have room for one.

Answers that come whole carry it unasked: `metadata.slo` of chat, text completions and messages (a list for several
choices), and as JSON text, which is all that OpenAI's own type of it allows, of responses, whose stream ends with the
whole response. The other streams have no such place: there one more event, the last but the one that ends the stream,
tells it to those who ask (`verdict`, server/limits.py). OpenAI's clients read it as a chunk without choices, as they
do usage; Anthropic's pass over an event whose name they do not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import orjson

from sglang_slo.server.visit import VISIT, Visit

KEY = "slo"
_ENDS = (b"data: [DONE]", b"event: message_stop")
_OVER = (
    "completed",
    "incomplete",
)  # cut off by its limit of tokens: a newer SGLang tells that from completed
_OF_A_CHUNK = ("id", "object", "created", "model")


def heard(verdict: dict[str, Any]) -> None:
    """Note the verdict on an answer of the request that this task serves."""
    visit = VISIT.get()
    if visit is not None:
        visit.verdicts.append(verdict)


def told(verdicts: Sequence[dict[str, Any] | None]) -> Any:
    """What a client reads: one verdict, or one for each choice."""
    return verdicts[0] if len(verdicts) == 1 else list(verdicts)


class LastEvent:
    """The event that tells the client of a stream what became of its limits."""

    def __init__(self, visit: Visit) -> None:
        self._visit = visit
        self._piece = b""  # the last one

    def before(self, piece: bytes) -> bytes:
        """`piece` of a body, behind the event if it ends a stream whose client asked for it."""
        if not self._visit.tell or not piece:
            return piece
        if self._visit.verdicts and piece.startswith(_ENDS):
            return self._event(piece) + piece
        self._piece = piece
        return piece

    def _event(self, end: bytes) -> bytes:
        verdict = told(self._visit.verdicts)
        if end.startswith(b"event:"):
            return b"event: slo\ndata: " + orjson.dumps({"type": KEY, KEY: verdict}) + b"\n\n"
        try:
            chunk = orjson.loads(self._piece.removeprefix(b"data: "))
        except ValueError:
            return b""
        if "choices" not in chunk:  # of /generate, whose own last event has it
            return b""
        ours = {key: chunk[key] for key in _OF_A_CHUNK if key in chunk}
        return b"data: " + orjson.dumps({**ours, "choices": [], "metadata": {KEY: verdict}}) + b"\n\n"


def install() -> None:
    """Let the answers of this process's HTTP server carry verdicts. Idempotent."""
    from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
    from sglang.srt.entrypoints.openai.protocol import ResponsesResponse
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
    from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion

    _wrap(OpenAIServingChat, "_build_chat_response", _of_choices)
    _wrap(OpenAIServingCompletion, "_build_completion_response", _of_choices)
    _wrap(AnthropicServing, "_convert_response", _of_a_message)
    _wrap(ResponsesResponse, "from_request", _of_a_response)


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    if getattr(original, "judged", False):
        return
    judged = wraps(original)(wrapper(original))
    judged.judged = True  # type: ignore[attr-defined]
    # a class method comes bound, and stays so
    setattr(owner, name, staticmethod(judged) if getattr(original, "__self__", None) is owner else judged)


def _of_choices(build: Callable[..., Any]) -> Callable[..., Any]:
    def judged(self: Any, request: Any, ret: list[dict[str, Any]], created: int) -> Any:
        response = build(self, request, ret, created)
        verdicts = [answer["meta_info"].get(KEY) for answer in ret]
        if any(verdicts) and hasattr(response, "metadata"):
            response.metadata = {**(response.metadata or {}), KEY: told(verdicts)}
        return response

    return judged


def _of_a_message(convert: Callable[..., Any]) -> Callable[..., Any]:
    from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesResponse

    class JudgedMessage(AnthropicMessagesResponse):
        metadata: dict[str, Any]

    def judged(self: Any, response: Any) -> Any:
        message, verdict = convert(self, response), (response.metadata or {}).get(KEY)
        if verdict is None:
            return message
        return JudgedMessage(**dict(message), metadata={KEY: verdict})

    return judged


def _of_a_response(make: Callable[..., Any]) -> Callable[..., Any]:
    def judged(*args: Any, **kwargs: Any) -> Any:
        response, visit = make(*args, **kwargs), VISIT.get()
        if visit is not None and visit.verdicts and response.status in _OVER:
            text = orjson.dumps(told(visit.verdicts)).decode()
            response.metadata = {**(response.metadata or {}), KEY: text}
        return response

    return judged
