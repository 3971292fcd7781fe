"""Brings the verdict on a request to its client: `meta_info.slo` of `/generate`, `metadata.slo` of OpenAI answers.

The scheduler ties the verdict to the request's finish reason (`attach`), the one thing that travels with the
last piece of output only, through detokenizer and every streaming mode, unchanged. As finish reasons hold
plain values on the wire, it goes as JSON text. In the HTTP process `judged_answers`, wrapped around SGLang's
tokenizer manager, moves it to `meta_info` before anyone sees it, and so it is there for `Engine` users too.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

KEY = "slo"


def attach(req: Any, answer: dict[str, Any]) -> None:
    """Tie `answer` (JSON values) to a finished SGLang `Req`; call before its last output is streamed."""
    reason = copy.copy(req.finished_reason)
    plain, text = reason.to_json(), json.dumps(answer)
    reason.to_json = lambda: {**plain, KEY: text}
    req.finished_reason = reason


def move(meta_info: dict[str, Any]) -> None:
    """Move the verdict, if there is one, from the finish reason to `meta_info["slo"]`."""
    reason = meta_info.get("finish_reason")
    if isinstance(reason, dict) and KEY in reason:
        meta_info[KEY] = json.loads(reason[KEY])
        meta_info["finish_reason"] = {k: v for k, v in reason.items() if k != KEY}


async def judged_answers(
    original: Callable[..., AsyncIterator[dict[str, Any]]], *args: Any, **kwargs: Any
) -> AsyncIterator[dict[str, Any]]:
    """The answers of `original`, the last one with its verdict in place."""
    answers = original(*args, **kwargs)
    async with contextlib.aclosing(answers) as closing:  # type: ignore[type-var]
        async for answer in closing:
            move(answer["meta_info"])
            yield answer


def install() -> None:
    """Wrap the tokenizer manager of this process (HTTP server, tokenizer worker, `Engine`). Idempotent."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    original = TokenizerManager._wait_one_response
    if getattr(original, "judged", False):
        return

    def wait_one_response(*args: Any, **kwargs: Any) -> AsyncIterator[dict[str, Any]]:
        return judged_answers(original, *args, **kwargs)

    wait_one_response.judged = True  # type: ignore[attr-defined]
    TokenizerManager._wait_one_response = wait_one_response


def install_openai() -> None:
    """Let chat and text completions that are answered whole carry the verdict on each choice. Idempotent."""
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
    from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion

    for serving, name in (
        (OpenAIServingChat, "_build_chat_response"),
        (OpenAIServingCompletion, "_build_completion_response"),
    ):
        original = getattr(serving, name)
        if not getattr(original, "judged", False):
            setattr(serving, name, _with_verdicts(original))


def _with_verdicts(build: Callable[..., Any]) -> Callable[..., Any]:
    def judged(self: Any, request: Any, ret: list[dict[str, Any]], created: int) -> Any:
        response = build(self, request, ret, created)
        verdicts = [answer["meta_info"].get(KEY) for answer in ret]
        if any(verdicts) and hasattr(response, "metadata"):
            told = verdicts[0] if len(verdicts) == 1 else verdicts
            response.metadata = {**(response.metadata or {}), KEY: told}
        return response

    judged.judged = True  # type: ignore[attr-defined]
    return judged
