"""Which field SGLang's own check of a /generate body refuses.

Newer releases check that body before it gets to the door, and tell what is wrong with it, but not where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from sglang_slo.server.errors import name

Check = Callable[[Any], str | None]  # a body -> what is wrong with it
FIELDS_TRIED, PROBLEM_SHOWN = 100, 200  # whatever a client sends, an answer is quick and short


def named(check: Check) -> Check:
    """The same check, with the field before what is wrong with it."""

    def checked(body: Any) -> str | None:
        problem = check(body)
        if problem is None:
            return None
        problem = problem[:PROBLEM_SHOWN]
        if not isinstance(body, dict):
            return problem
        field = next((path for path, alone in islice(_fields(body), FIELDS_TRIED) if check(alone)), None)
        return f"{field}: {problem}" if field else problem

    return checked


def _fields(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each field's name, and a body in which there is no other that could be wrong; the innermost first."""
    params = body.get("sampling_params")
    if isinstance(params, dict):
        for key, value in params.items():
            yield f"sampling_params.{name(key)}", {"text": "", "sampling_params": {key: value}}
    for key, value in body.items():
        yield name(key), {"text": "", key: value}


def install() -> None:
    """Name fields in this process's HTTP server, if its SGLang has such a check. Idempotent."""
    from sglang.srt.entrypoints import http_server

    check = getattr(http_server, "generate_contract_error", None)
    if check is not None and check.__module__ != __name__:
        http_server.generate_contract_error = named(check)
