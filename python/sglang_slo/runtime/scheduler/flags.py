"""SGLang's flags and modes beside ours (`modes.TABLE`), used three ways.

`refusals` before a server starts, `uncovered` in the scheduler, `markdown` for the README. A flag that is not in the table
is SGLang's own business and works as it always did.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_slo.config import SloConfig
from sglang_slo.runtime.scheduler.modes import REFUSED, STOCK, TABLE, Row
from sglang_slo.runtime.sglang.settings import resolved


def refusals(server_args: Any, config: SloConfig) -> list[str]:
    """Why a server cannot start so, one message a flag; empty: it can."""
    if config.policy == "off":
        return []
    return [
        f"{row.flags}: {row.why} (or --slo-policy off)" for row in _matching(REFUSED, server_args, config)
    ]


def stock_reasons(server_args: Any, config: SloConfig) -> list[str]:
    """Why a server started so must schedule as stock, from its flags alone; empty: ours can run."""
    return [f"{row.flags}: {row.why}" for row in _matching(STOCK, server_args, config)]


def uncovered(scheduler: Any, config: SloConfig) -> str | None:
    """Why a built `Scheduler` must run as stock, from its flags, its model and its cache; None: ours can."""
    reasons = stock_reasons(resolved(scheduler.server_args), config)
    if config.policy == "off":
        reasons.append("--slo-policy off")
    if not scheduler.is_generation:
        reasons.append("the model generates no tokens")
    if scheduler.model_config.is_encoder_decoder:
        reasons.append("the model is an encoder-decoder")
    from sglang_slo.runtime.sglang import pools  # SGLang's own modules: not before a server starts
    from sglang_slo.runtime.sglang.tree import KNOWN_CACHES

    cache = type(scheduler.tree_cache).__name__
    if several := pools.unknown(scheduler):
        reasons.append(several)
    elif cache not in KNOWN_CACHES:
        reasons.append(f"its KV cache is a {cache}; known: {', '.join(KNOWN_CACHES)}")
    return "; ".join(reasons) or None


def markdown() -> str:
    """The table for the README."""
    lines = ["| SGLang's flag or mode | with the deadline scheduler | why |", "|---|---|---|"]
    lines += [f"| {row.flags.replace('|', ' ')} | {row.what} | {row.why} |" for row in TABLE]
    return "\n".join(lines) + "\n"


def _matching(what: str, server_args: Any, config: SloConfig) -> Iterator[Row]:
    for row in TABLE:
        if row.what == what and row.applies is not None and row.applies(server_args, config):
            yield row
