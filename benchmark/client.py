"""Replays a workload against a live server over HTTP and times every token: `replay(workload, url)` ->
RunResult.

Open loop: each request is sent at its arrival time whatever became of the others, and is judged from that
time on, also if the client was late to send it. Lengths are exact (`ignore_eos`, `max_new_tokens` the true
length); each request carries the limits of its class, which stock SGLang ignores. Scored by the twin's code.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from sglang_slo.core.attainment import deliveries_of_tokens
from sglang_slo.core.slo import GapRule, Slo
from sglang_slo.twin.result.requests import empty_requests
from sglang_slo.twin.result.run_result import Iterations, RunResult
from sglang_slo.twin.sim.tokens import prompt
from sglang_slo.twin.workloads.workload import Workload

WARM_UP = 3  # requests before the clock starts
SMALLEST_VOCABULARY = 500  # token ids below this exist in every model, and are no special tokens above 100
FIRST_ID = 100
REQUEST_S = 900.0  # after this a request counts as never finished


@dataclass
class Answer:
    """What came back for one request. `token_s`: arrival of each token, seconds since the start of the run."""

    token_s: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    lag_s: float = 0.0  # how late it was sent
    error: str | None = None


def replay(workload: Workload, url: str, scheduler: str, settings: dict[str, Any] | None = None) -> RunResult:
    """Run the whole workload against `url` and score it. `scheduler`: the name shown."""
    began = time.perf_counter()
    answers = asyncio.run(_replay(workload, url))
    return score(workload, answers, scheduler, settings or {}, time.perf_counter() - began)


def score(
    workload: Workload, answers: list[Answer], scheduler: str, settings: dict[str, Any], wall_s: float = 0.0
) -> RunResult:
    """Answers as a RunResult: the same rows and rules as a run of the twin; no iterations are known."""
    rows = empty_requests(
        workload.class_id,
        workload.arrival_s,
        workload.input_tokens,
        workload.output_tokens,
        workload.limits,
    )
    for i, answer in enumerate(answers):
        rows.cached_tokens[i] = answer.cached_tokens
        if answer.token_s:
            out = deliveries_of_tokens(answer.token_s, workload.limits[int(workload.class_id[i])])
            rows.take(i, out, whole=answer.error is None and out.tokens == workload.output_tokens[i])
    none = np.empty(0, np.int64)
    lags = [a.lag_s for a in answers] or [0.0]
    return RunResult(
        workload=workload.name,
        scheduler=scheduler,
        settings=settings,
        profile="live server",
        seed=workload.seed,
        load=workload.load,
        class_names=workload.class_names,
        kv_capacity_tokens=0,
        requests=rows,
        iterations=Iterations(np.empty(0), np.empty(0), *[none] * 7),
        wall_s=wall_s,
        notes={
            "errors": float(sum(a.error is not None for a in answers)),
            "send_lag_max_s": float(max(lags)),
        },
    )


def body(workload: Workload, i: int) -> dict[str, Any]:
    """The request as the server gets it."""
    ids = np.array(prompt(workload, i)) % (SMALLEST_VOCABULARY - FIRST_ID) + FIRST_ID
    params = {"max_new_tokens": int(workload.output_tokens[i]), "ignore_eos": True, "temperature": 0}
    limits = slo_field(workload.limits[int(workload.class_id[i])])
    return {
        "input_ids": ids.tolist(),
        "sampling_params": params,
        "stream": True,
        **({"slo": limits} if limits else {}),
    }


def slo_field(slo: Slo) -> dict[str, Any]:
    """The limits that were promised, ms, and what is meant by them; nothing for none."""
    limits = {"ttft_ms": slo.ttft_s, "tbt_ms": slo.tbt_s, "tpot_ms": slo.tpot_s, "e2e_ms": slo.e2e_s}
    field: dict[str, Any] = {name: s * 1e3 for name, s in limits.items() if math.isfinite(s)}
    if "tbt_ms" in field and slo.gap_rule is GapRule.PACE:
        field["pace"] = True
    if "tbt_ms" in field and slo.gap_rule is GapRule.P99:
        field["percentile"] = 99
        if math.isfinite(slo.max_pause_s):
            field["max_pause_ms"] = slo.max_pause_s * 1e3
    return field


async def _replay(workload: Workload, url: str) -> list[Answer]:
    timeout = aiohttp.ClientTimeout(total=REQUEST_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        for i in range(min(WARM_UP, len(workload))):
            warm = await _one(session, url, body(workload, i), 0.0, time.perf_counter())
            if warm.error:
                raise RuntimeError(f"{url}: a request to warm up failed: {warm.error}")
        await _flush(session, url)
        # Bodies are made beforehand: that is no work for the time of the run.
        bodies = [body(workload, i) for i in range(len(workload))]
        start = time.perf_counter() + 0.2
        sends = [
            _one(session, url, bodies[i], float(workload.arrival_s[i]), start) for i in range(len(workload))
        ]
        return list(await asyncio.gather(*sends))


async def _flush(session: aiohttp.ClientSession, url: str) -> None:
    """Empty the prefix cache: what came before must not be found in it. Refused while a request is in flight."""
    for _ in range(60):
        async with session.post(url + "/flush_cache") as flushed:
            if flushed.status == 200:
                return
        await asyncio.sleep(0.5)
    raise RuntimeError(
        f"{url}: /flush_cache was refused for half a minute: is someone else using the server?"
    )


async def _one(
    session: aiohttp.ClientSession, url: str, payload: dict[str, Any], arrival_s: float, start: float
) -> Answer:
    answer = Answer()
    await asyncio.sleep(max(start + arrival_s - time.perf_counter(), 0.0))
    answer.lag_s = max(time.perf_counter() - start - arrival_s, 0.0)
    try:
        async with session.post(url + "/generate", json=payload) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return answer
            async for line in response.content:
                if line.startswith(b"data: {"):
                    _take(answer, json.loads(line[6:]), time.perf_counter() - start)
                    if answer.error:
                        return answer
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def _take(answer: Answer, event: dict[str, Any], now_s: float) -> None:
    """One event of the stream; several tokens in one came at one time."""
    if "error" in event:
        answer.error = str(event["error"])
        return
    meta = event["meta_info"]
    answer.token_s += [now_s] * (int(meta["completion_tokens"]) - len(answer.token_s))
    answer.cached_tokens = int(meta.get("cached_tokens") or 0)
    reason = meta.get("finish_reason")
    if reason and reason.get("type") == "abort":
        answer.error = str(reason.get("message") or "aborted")
