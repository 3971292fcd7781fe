"""Every feature of a request under pressure, against stock SGLang one by one: the greedy tokens are equal.

A small pool, small chunks and a burst of all kinds at once make the scheduler park, swap and preempt; its own counters
must show that it did, or the comparison proves nothing.
"""

from __future__ import annotations

import asyncio
import json
import random
import urllib.request
from pathlib import Path
from typing import Any

from campaign.serving import Answer, Check, Client, serving

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 999}},
        "required": ["age"],
    }
)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "frequency penalty": {"params": {"frequency_penalty": 0.9}},
    "presence penalty": {"params": {"presence_penalty": 0.7}},
    "repetition penalty": {"params": {"repetition_penalty": 1.3}},
    "min new tokens": {"params": {"min_new_tokens": 20, "ignore_eos": False}},
    "logit bias": {"params": {"logit_bias": {"77": 5.0}}},
    "stop token": {"params": {"stop_token_ids": list(range(300, 320)), "ignore_eos": False}},
    "json schema": {"params": {"json_schema": SCHEMA, "ignore_eos": False}},
    "regex": {"params": {"regex": "(ab|cd){12}z", "ignore_eos": False}},
    "two answers": {"params": {"n": 2}},
    "logprobs of the output": {"return_logprob": True},
    "logprobs of all": {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2},
    "hidden states": {"return_hidden_states": True},
    "no special tokens skipped": {"params": {"skip_special_tokens": False}},
}
LIMITS = (
    None,
    {"ttft_ms": 800, "tbt_ms": 60},
    {"ttft_ms": 20000, "tbt_ms": 1000},
    {"ttft_ms": 1, "tbt_ms": 1},
)
# SGLang returns hidden states of the last piece of a prompt only: both cut at the same places
SAME = ["--chunked-prefill-size", "64", "--enable-return-hidden-states"]
MOST_BURSTS = 5
ROOMY, TIGHT = (["--max-total-tokens", tokens, *SAME] for tokens in ("20000", "900"))
BOLD = ["--slo-kv", "stock", "--schedule-conservativeness", "0.05", "--slo-max-preemptions", "50"]
WAYS = {
    "swap": ["--slo-preempt", "swap", "--slo-host-kv-gb", "0.02"],
    "keep": ["--slo-preempt", "keep"],
    "recompute": ["--slo-preempt", "recompute"],
}
WAYS |= {f"{way}, page 16": [*flags, "--page-size", "16"] for way, flags in WAYS.items()}


def requests(copies: int) -> dict[str, dict[str, Any]]:
    """The burst by name: each kind so many times, with prompts of its own."""
    out = {}
    for kind, fields in KINDS.items():
        for copy in range(copies):
            rng = random.Random(f"{kind} {copy}")
            ids = [rng.randrange(10, 500) for _ in range(rng.choice([20, 60, 150, 260]))]
            out[f"{kind} {copy}"] = {"ids": ids, "tokens": rng.choice([12, 30, 48]), **fields}
    return out


def matrix(folder: Path, copies: int = 2, ways: tuple[str, ...] = tuple(WAYS)) -> list[Check]:
    """One check for each way of preemption."""
    wanted = requests(copies)
    with serving("stock", ROOMY, folder / "stock.log") as server:
        expected = asyncio.run(_one_by_one(server.url, wanted))
    checks = []
    for way in ways:
        with serving("slo", [*TIGHT, *BOLD, *WAYS[way]], folder / f"{way}.log") as server:
            for _ in range(MOST_BURSTS):  # KV does not run short every time
                _flushed(server.url)
                got, status = asyncio.run(_burst(server.url, wanted))
                if got != expected or _pressed(way, status):
                    break
        checks.append(_compared(way, expected, got, status))
    return checks


def _flushed(url: str) -> None:
    """Hidden states come without those of what is cached, in stock SGLang as well: nothing is."""
    urllib.request.urlopen(urllib.request.Request(url + "/flush_cache", method="POST"), timeout=60).close()


async def _one_by_one(url: str, wanted: dict[str, dict[str, Any]]) -> dict[str, Any]:
    async with Client(url) as client:
        return {name: _slim(await client.generate(**_fields(fields))) for name, fields in wanted.items()}


async def _burst(url: str, wanted: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    async with Client(url, len(wanted)) as client:

        async def one(n: int, fields: dict[str, Any]) -> Any:
            await asyncio.sleep(0.03 * n)
            limits = LIMITS[n % len(LIMITS)]
            said: dict[str, Any] = {"slo": limits} if limits else {}
            return _slim(await client.generate(**_fields(fields), **said))

        names = list(wanted)
        random.Random(1).shuffle(names)
        answers = await asyncio.gather(*(one(n, wanted[name]) for n, name in enumerate(names)))
        return dict(zip(names, answers, strict=True)), await client.calm()


def _fields(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, **({"params": dict(fields["params"])} if "params" in fields else {})}


def _slim(answer: Answer) -> Any:
    """What must be equal: status, token ids, why it ended, how many logprobs and rows of hidden states."""
    if answer.status != 200:
        return {"status": answer.status, "body": str(answer.body)[:200]}
    bodies = answer.body if isinstance(answer.body, list) else [answer.body]
    return [
        {
            "ids": b.get("output_ids"),
            "end": (b["meta_info"].get("finish_reason") or {}).get("type"),
            "logprobs": [
                [t[1] for t in b["meta_info"].get(key) or []]
                for key in ("input_token_logprobs", "output_token_logprobs")
            ],
            "hidden": [len(rows) for rows in (b["meta_info"].get("hidden_states") or [])[:1]],
        }
        for b in bodies
    ]


def _moved(status: dict[str, Any]) -> dict[str, int]:
    """How often requests were taken out, by way, and set aside, since the server started."""
    now, totals = status.get("now") or {}, status.get("totals") or {}
    return {**(now.get("preemptions") or {}), "parked": totals.get("parked", 0)}


def _pressed(way: str, status: dict[str, Any]) -> bool:
    """Whether some were preempted in this way, and some set aside."""
    moved = _moved(status)
    return bool(moved.get(way.split(",")[0])) and bool(moved["parked"])


def _compared(way: str, expected: dict[str, Any], got: dict[str, Any], status: dict[str, Any]) -> Check:
    wrong = sorted(name for name in expected if got[name] != expected[name])
    moved, pressed = _moved(status), _pressed(way, status)
    fallbacks = (status.get("fallbacks") or {}).get("count")
    detail = f"{len(expected) - len(wrong)} of {len(expected)} equal to stock; {moved}; {fallbacks} fallbacks"
    if wrong:
        detail += f"; differ: {', '.join(wrong[:6])}; first: {got[wrong[0]]!s:.200}"
    if not pressed:
        detail += "; NOT under pressure: this proves nothing"
    return Check(f"features under pressure, {way}", not wrong and pressed and fallbacks == 0, detail, moved)
