"""Replays a workload against a live server over HTTP and scores it with the twin's own code.

Requests are sent at their arrival times whatever became of the earlier ones (open loop), with exact lengths
and with their limits as headers, which stock SGLang ignores. A token's time is when its event of the stream
was read here.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = (3, 500)  # ids that every tokenizer used here knows, without its special ones
GRACE_S = 120.0  # after the last arrival


def replay(
    url: str, workload_file: Path, load: float, data: Path | None, requests: int, limit_s: float
) -> dict[str, Any]:
    """Every measure of `sglang_slo.twin.result`. What is not done within `limit_s` counts as unfinished."""
    from sglang_slo.twin.result import Iterations, RunResult, empty_requests
    from sglang_slo.twin.workload import load_workload

    work = load_workload(str(workload_file), load=load, data=data, max_requests=requests)
    rows = empty_requests(work.class_id, work.arrival_s, work.input_tokens, work.output_tokens, work.limits)
    allowed_s = min(float(work.arrival_s[-1]) + GRACE_S, max(limit_s - 5, 1))
    begin = time.perf_counter()
    asyncio.run(asyncio.wait_for(_send_all(url, work, rows, begin, allowed_s), allowed_s + 10))
    none = np.zeros(0)
    its = Iterations(none, none, *(np.zeros(0, np.int64) for _ in range(7)))
    result = RunResult(work.name, url, {}, work.profile_name, work.seed, load, work.class_names, 0, rows, its)
    result.wall_s = time.perf_counter() - begin
    return dict(json.loads(result.to_json()))


async def _send_all(url: str, work: Any, rows: Any, begin: float, allowed_s: float) -> None:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        tasks = [asyncio.create_task(_one(session, url, work, rows, i, begin)) for i in range(len(work))]
        done, late = await asyncio.wait(tasks, timeout=allowed_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        failed = [task.exception() for task in done if task.exception()]
    if len(failed) == len(tasks):
        raise RuntimeError(f"every request failed; the first: {failed[0]!r}")


async def _one(session: Any, url: str, work: Any, rows: Any, i: int, begin: float) -> None:
    from sglang_slo.twin.result import gap_figures

    body = request_body(work, i)
    await asyncio.sleep(max(begin + float(work.arrival_s[i]) - time.perf_counter(), 0))
    sent = time.perf_counter()
    times: list[float] = []
    async with session.post(f"{url}/generate", json=body, headers=limit_headers(work, i)) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not line.startswith(b"data:") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[5:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            tokens = event["meta_info"]["completion_tokens"]
            times += [time.perf_counter() - sent] * (tokens - len(times))
    if times:
        rows.ttft_s[i] = times[0]
    if len(times) >= work.output_tokens[i]:
        rows.tbt_s[i], rows.tpot_s[i], rows.max_gap_s[i] = gap_figures(np.array(times))
        rows.end_s[i] = sent - begin + times[-1]
        rows.cached_tokens[i] = event["meta_info"].get("cached_tokens", 0)


def request_body(work: Any, i: int) -> dict[str, Any]:
    """What `/generate` is sent for request i: the same ids in every run, unlike any other request's."""
    rng = np.random.default_rng([work.seed, i])
    ids = rng.integers(*VOCABULARY, int(work.input_tokens[i])).tolist()
    params = {"temperature": 0, "max_new_tokens": int(work.output_tokens[i]), "ignore_eos": True}
    return {"input_ids": ids, "sampling_params": params, "stream": True}


def limit_headers(work: Any, i: int) -> dict[str, str]:
    """The limits of request i as headers; none for a limit it does not have."""
    limits = work.limits[int(work.class_id[i])]
    named = {"x-slo-ttft-ms": limits.ttft_s * 1e3, "x-slo-tbt-ms": limits.tbt_s * 1e3}
    return {name: f"{value:g}" for name, value in named.items() if math.isfinite(value)}
