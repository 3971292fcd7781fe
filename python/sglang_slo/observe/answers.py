"""Brings the verdict on a request to its client: `meta_info.slo` of `/generate`; other APIs: server/verdicts.py.

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
Heard = Callable[[dict[str, Any]], None]


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


def span_attributes(
    original: Callable[..., dict[str, Any]], manager: Any, state: Any, out: Any, i: int
) -> Any:
    """SGLang's attributes of a request's span (`--enable-trace`), with class, limits, verdict and preemptions."""
    attributes = original(manager, state, out, i)
    reason = out.finished_reasons[i]
    if not isinstance(reason, dict) or KEY not in reason:
        return attributes
    told = {name: value for name, value in json.loads(reason[KEY]).items() if value is not None}
    by_rule = told.pop("attained_by_rule", {})
    ours = {f"slo.{name}": value for name, value in told.items()}
    ours |= {f"slo.attained_by_rule.{rule}": kept for rule, kept in by_rule.items()}
    return {**attributes, **ours, "slo.preemptions": out.retraction_counts[i]}


async def judged_answers(
    answers: AsyncIterator[dict[str, Any]], heard: Heard
) -> AsyncIterator[dict[str, Any]]:
    """The same answers, the last one with its verdict in place, which `heard` is told as well."""
    async with contextlib.aclosing(answers) as closing:  # type: ignore[type-var]
        async for answer in closing:
            move(answer["meta_info"])
            if KEY in answer["meta_info"]:
                heard(answer["meta_info"][KEY])
            yield answer


def install(heard: Heard) -> None:
    """Wrap the tokenizer manager of this process (HTTP server, tokenizer worker, `Engine`). Idempotent.

    `heard` is called with each verdict, in the task that waits for the answer.
    """
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    original = TokenizerManager._wait_one_response
    if getattr(original, "judged", False):
        return

    def wait_one_response(*args: Any, **kwargs: Any) -> AsyncIterator[dict[str, Any]]:
        # at once: SGLang may look up here what is gone before the first of these answers is waited for
        return judged_answers(original(*args, **kwargs), heard)

    wait_one_response.judged = True  # type: ignore[attr-defined]
    TokenizerManager._wait_one_response = wait_one_response
