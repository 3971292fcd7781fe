"""Requests and flags for which KV runs short: too many get in, and have to leave again."""

from __future__ import annotations

from typing import Any

import real_scheduler as real

COUNT = 10
POOL = ["--max-total-tokens", "400"]
# SGLang's admission with next to no reserve: too many get in, and KV runs short
BOLD = ["--slo-kv", "stock", "--schedule-conservativeness", "0.05", "--slo-length", "none"]
MANY = ["--slo-max-preemptions", "50"]
SWAP = [*POOL, *BOLD, *MANY, "--slo-preempt", "swap", "--slo-host-kv-gb", "0.002"]


def requests(prefix: str = "") -> list[Any]:
    """Their prompts share nothing; ids begin with `prefix`."""
    return [real.request(f"{prefix}r{i}", p, 60 + 5 * i) for i, p in enumerate(real.prompts(COUNT, 20))]
