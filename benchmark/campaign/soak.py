"""Clients of every kind for a long time: everyone is answered, and the server holds at the end what it held at the start."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaign.matrix import KINDS, LIMITS
from campaign.serving import Check, Client, Serving, serving

FLAGS = [
    "--max-total-tokens",
    "2000",
    "--slo-host-kv-gb",
    "0.02",
    "--chunked-prefill-size",
    "128",
    "--enable-metrics",
]
CLIENTS = 12
WARM_S = 60.0  # before the first look at memory: caches fill, models load
SAMPLE_S = 15.0
MOST_GROWTH_MIB = 64.0  # of a process from the first look to the last
MOST_MORE = 8  # descriptors or threads


def soak(folder: Path, minutes: float, seed: int, say: Callable[[str], None]) -> list[Check]:
    """Run for so long. The first look at the processes comes after a minute or a quarter of the time."""
    flags = [
        *FLAGS,
        "--slo-request-log",
        str(folder / "requests.jsonl"),
        "--slo-model-dir",
        str(folder / "lengths"),
    ]
    with serving("slo", flags, folder / "soak.log") as server:
        return asyncio.run(soaked(server, minutes * 60, seed, say))


async def soaked(server: Serving, seconds: float, seed: int, say: Callable[[str], None]) -> list[Check]:
    counts: Counter[str] = Counter()
    began = time.monotonic()
    end = began + seconds
    async with Client(server.url, 4 * CLIENTS) as client:
        work = [
            asyncio.create_task(_client(client, random.Random(f"soak {seed} {n}"), end, counts))
            for n in range(CLIENTS)
        ]
        await asyncio.sleep(min(WARM_S, seconds / 4))
        first = server.held()
        while time.monotonic() < end:
            await asyncio.sleep(min(SAMPLE_S, max(end - time.monotonic(), 0.1)))
            say(f"soak: {(time.monotonic() - began) / 60:.1f} of {seconds / 60:.0f} min, {dict(counts)}")
        await asyncio.gather(*work)
        status = await client.calm()
        last = server.held()
        served = await client.alive()
    return [_answered(counts, served), _level(first, last), _at_rest(status)]


async def _client(client: Client, rng: random.Random, end: float, counts: Counter[str]) -> None:
    while time.monotonic() < end:
        kind = rng.choice(list(KINDS))
        fields: dict[str, Any] = {
            k: (dict(v) if isinstance(v, dict) else v)
            for k, v in KINDS[kind].items()
            if k != "return_hidden_states"
        }
        ids = [rng.randrange(10, 500) for _ in range(rng.choice([3, 40, 150, 400]))]
        limits = rng.choice(LIMITS)
        fields |= {"slo": limits} if limits else {}
        how = rng.random()
        if how < 0.15:
            await _hang_up(client, ids, rng.randrange(1, 6))
            counts["hung up"] += 1
        elif how < 0.2:
            rid = f"soak-{rng.getrandbits(48)}"
            asked = asyncio.create_task(client.generate(ids, 40, rid=rid, **fields))
            await asyncio.sleep(rng.random())
            await client.ask("/abort_request", {"rid": rid})
            counts[f"aborted {(await asked).status}"] += 1
        elif how < 0.25:
            answer = await client.ask("/v1/chat/completions", _chat(rng), {"x-slo-ttft-ms": "900"})
            counts[f"chat {answer.status}"] += 1
        else:
            least = int(
                fields.get("params", {}).get("min_new_tokens", 0)
            )  # more than the most is refused, rightly
            answer = await client.generate(ids, max(rng.choice([1, 8, 40]), least), **fields)
            counts[f"answered {answer.status or answer.body}"] += 1


def _chat(rng: random.Random) -> dict[str, Any]:
    return {
        "model": "m",
        "messages": [{"role": "user", "content": "hello " * rng.randrange(1, 30)}],
        "max_tokens": 12,
    }


async def _hang_up(client: Client, ids: list[int], after: int) -> None:
    """Reads a few tokens and goes."""
    params = {"max_new_tokens": 40, "ignore_eos": True}
    with contextlib.suppress(Exception):
        async with asyncio.timeout(60):
            async for _ in client.stream({"input_ids": ids, "sampling_params": params}, after):
                pass


def _answered(counts: Counter[str], served: bool) -> Check:
    good = {"answered 200", "chat 200", "hung up"}
    bad = {k: n for k, n in counts.items() if k not in good and not k.startswith("aborted")}
    return Check(
        "soak: everyone is answered", not bad and served, f"{sum(counts.values())} requests", dict(counts)
    )


def _level(first: dict[str, dict[str, float]], last: dict[str, dict[str, float]]) -> Check:
    grown = []
    for role, after in last.items():
        before = first.get(role)
        if before is None:
            continue
        for what, most in (("rss_mib", MOST_GROWTH_MIB), ("descriptors", MOST_MORE), ("threads", MOST_MORE)):
            if after[what] - before[what] > most:
                grown.append(f"{role}: {what} {before[what]} to {after[what]}")
    detail = "; ".join(grown) or "memory, descriptors and threads of each process stayed level"
    return Check("soak: nothing grows", not grown, detail, {"first": first, "last": last})


def _at_rest(status: dict[str, Any]) -> Check:
    now = status.get("now") or {}
    kv, fallbacks = now.get("kv") or {}, (status.get("fallbacks") or {}).get("count")
    whole = kv.get("free", 0) + kv.get("evictable", 0) == kv.get("capacity", -1)
    calm = whole and not now.get("running") and fallbacks == 0 and not status.get("observer_errors")
    detail = f"kv {kv}, {fallbacks} fallbacks, {status.get('observer_errors')} errors in observing, {now.get('preemptions')}"
    return Check("soak: at rest all KV is free, and every plan was ours", bool(calm), detail)
