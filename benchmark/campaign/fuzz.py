"""Requests that no client should send, at every endpoint that generates: each gets an answer, and the next one is served.

A body is a sound one with a few changes: a value of another kind, a huge or tiny number, a limit that makes no sense, a
deep or long value, broken text. HTTP 500 counts as broken where stock SGLang answers otherwise.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from campaign.serving import Answer, Check, Client, serving
from sglang_slo.cpu.demo_model import demo_model_path

FLAGS = ["--max-total-tokens", "3000", "--slo-host-kv-gb", "0.01", "--chunked-prefill-size", "128"]
AT_ONCE = 8
ALONE = 0.5  # share of the times that one comes alone
PROBE_EVERY = 40
MOST_RESTARTS = 12
CHAT = [{"role": "user", "content": "hello"}]
SOUND: dict[str, dict[str, Any]] = {
    "/generate": {"text": "hello", "sampling_params": {"max_new_tokens": 4, "temperature": 0}},
    "/v1/completions": {"model": "m", "prompt": "hello", "max_tokens": 4},
    "/v1/chat/completions": {"model": "m", "messages": CHAT, "max_tokens": 4},
    "/v1/responses": {
        "model": str(demo_model_path()),
        "input": "hello",
        "max_output_tokens": 4,
        "store": False,
    },
    "/v1/messages": {"model": "m", "messages": CHAT, "max_tokens": 4},
    "/invocations": {"model": "m", "messages": CHAT, "max_tokens": 4},
    "/vertex_generate": {
        "instances": [{"text": "a"}],
        "parameters": {"sampling_params": {"max_new_tokens": 4}},
    },
    "/api/generate": {"model": "m", "prompt": "hello", "stream": False, "options": {"num_predict": 4}},
    "/api/chat": {"model": "m", "messages": CHAT, "stream": False, "options": {"num_predict": 4}},
    "/v1/score": {"model": "m", "query": "a", "items": ["b"], "label_token_ids": [5]},
    "/v1/embeddings": {"model": "m", "input": "a"},
}
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, -(2**63), 2**70, 1e308, 1e-320, 0.5, "", "x", "9" * 400, "\ud800", "\x00", [], {}, [[]],
    [None], {"a": {"b": []}}, ["a"] * 50, "a" * 20_000, float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
LIMITS: tuple[Any, ...] = (
    {"ttft_ms": 500}, {"tbt_ms": 40}, {"ttft_ms": 1e-12}, {"ttft_ms": -1}, {"tbt_ms": 0}, {"resolved": True}, [], "x",
    {"ttft_ms": 500, "tbt_ms": 40, "class": "chat"}, {"class": "gold"}, {"\ud800": 1}, [{"ttft_ms": 1}], {"ttft_ms": "5"},
    {"ttft_s": 1.0, "resolved": True, "tbt_s": None}, {"ttft_ms": 2**80},
)  # fmt: skip
HEADERS = ("x-slo-ttft-ms", "x-slo-tbt-ms", "x-slo-tpot-ms", "x-slo-class", "x-slo-nonsense", "x-request-id")
HEADER_VALUES = ("500", "-5", "0", "nan", "1e999", "0x10", "", "gold", "5, 6", "1" * 5000, "é", "500ms")
PARAMS = (
    "max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "n", "stop", "stop_token_ids", "regex", "ebnf",
    "json_schema", "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "custom_params", "min_p",
    "ignore_eos", "skip_special_tokens", "no_stop_trim", "stop_regex",
)  # fmt: skip
# all that SGLang reads of a request, and what the endpoints add
FIELDS = (
    *(f.name for f in dataclasses.fields(GenerateReqInput)),
    "slo",
    "metadata",
    "user",
    "custom_labels",
    "service_tier",
)
# what ends stock SGLang too, and is looked at on its own: ids that the model does not have
DEADLY = {"input_ids", "label_token_ids"}


@dataclass
class Sent:
    """One fuzzed request."""

    path: str
    body: bytes
    headers: dict[str, str]

    def __str__(self) -> str:
        return f"{self.path} {self.headers or ''} {self.body[:300]!r}"


def fuzzed(rng: random.Random, deadly: bool = False) -> Sent:
    """A request out of the ordinary; without `deadly`, none with ids that would end stock SGLang as well."""
    path = rng.choice(list(SOUND))
    body = copy.deepcopy(SOUND[path])
    for _ in range(rng.choice([1, 1, 2, 3])):
        _changed(rng, body, deadly)
    if rng.random() < 0.4:
        target = body if rng.random() < 0.7 else body.setdefault("sampling_params", {})
        if isinstance(target, dict):
            target[rng.choice(["slo", "custom_params"])] = _limits(rng)
    text = json.dumps(body)
    if rng.random() < 0.05:
        deep = rng.choice([20, 200, 960, 1000, 2000])
        text = text[:-1] + ', "deep": ' + "[" * deep + "]" * deep + "}"
    if rng.random() < 0.05:
        text = text[: rng.randrange(len(text))]
    raw = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.03:
        raw = text.encode(rng.choice(["utf-16", "utf-8-sig", "utf-32-be"]), "surrogatepass")
    headers = {}
    while rng.random() < 0.3:
        headers[rng.choice(HEADERS)] = rng.choice(HEADER_VALUES)
    return Sent(path, raw, headers)


def _changed(rng: random.Random, body: dict[str, Any], deadly: bool) -> None:
    place = body
    params = body.get("sampling_params")
    if isinstance(params, dict) and rng.random() < 0.6:
        place = params
    names = [*place, *(PARAMS if rng.random() < 0.6 else FIELDS)]
    name = rng.choice([n for n in names if deadly or n not in DEADLY])
    if rng.random() < 0.1:
        place.pop(name, None)
    else:
        place[name] = rng.choice(ODD)


def _limits(rng: random.Random) -> Any:
    limits = copy.deepcopy(rng.choice(LIMITS))
    if isinstance(limits, dict) and rng.random() < 0.3:
        limits[rng.choice(["ttft_ms", "tbt_ms", "tpot_ms", "e2e_ms", "pace", "percentile"])] = rng.choice(ODD)
    return {"slo": limits} if rng.random() < 0.3 else limits


@dataclass
class Seen:
    statuses: Counter[int] = field(default_factory=Counter)
    failed: list[Sent] = field(default_factory=list)  # HTTP 500 and above, but 503
    hung: list[Sent] = field(default_factory=list)
    deaths: list[list[Sent]] = field(default_factory=list)  # what was sent last before each
    unserved: int = 0  # sound requests that were not served though the server lived


def fuzz(folder: Path, count: int, seed: int, say: Callable[[str], None]) -> list[Check]:
    """Send `count` of them; the server is started anew when it dies."""
    rng, seen, left = random.Random(f"fuzz {seed}"), Seen(), count
    while left > 0 and len(seen.deaths) <= MOST_RESTARTS:
        with serving("slo", FLAGS, folder / f"fuzz-{len(seen.deaths)}.log") as server:
            left = asyncio.run(send_fuzzed(server.url, rng, left, seen, say))
    worse = _stock_is_better(folder, seen.failed)
    deaths = "; ".join(f"one of: {' | '.join(str(s) for s in last)}" for last in seen.deaths[:3])
    return [
        Check(
            "fuzz: the server lives",
            not seen.deaths,
            f"{len(seen.deaths)} deaths in {count - left}. {deaths}",
        ),
        Check(
            "fuzz: every request is answered", not seen.hung, f"{len(seen.hung)} hung. {_first(seen.hung)}"
        ),
        Check("fuzz: the next sound one is served", not seen.unserved, f"{seen.unserved} were not"),
        Check(
            "fuzz: no HTTP 500 that stock would not give",
            not worse,
            f"{len(seen.failed)} of 500 and above, {len(worse)} of them ours. {_first(worse)}",
            {str(k): v for k, v in sorted(seen.statuses.items())},
        ),
    ]


def _first(sent: list[Sent]) -> str:
    return " | ".join(str(s) for s in sent[:3])


async def send_fuzzed(url: str, rng: random.Random, left: int, seen: Seen, say: Callable[[str], None]) -> int:
    """Send until `left` are sent or nobody answers; how many are left then."""
    async with Client(url) as client:
        recent: list[Sent] = []
        unprobed = 0
        while left > 0:
            # what ends a pass of its own may hide in a batch
            at_once = 1 if rng.random() < ALONE else AT_ONCE
            some = [fuzzed(rng) for _ in range(min(at_once, left))]
            recent = [*recent, *some][-PROBE_EVERY:]
            answers = await asyncio.gather(*(client.ask(s.path, s.body, s.headers, 60) for s in some))
            left, unprobed = left - len(some), unprobed + len(some)
            _note(seen, some, answers)
            gone = all(a.status == 0 for a in answers)
            if gone or unprobed >= PROBE_EVERY or left <= 0:
                unprobed = 0
                if not await client.alive():
                    if (await client.ask("/health", None, limit_s=30)).status == 200:
                        seen.unserved += 1
                    seen.deaths.append(some if gone else recent)
                    return left
                say(f"fuzz: {left} left, {dict(seen.statuses)}, {len(seen.hung)} hung")
    return left


def _note(seen: Seen, some: list[Sent], answers: list[Answer]) -> None:
    for sent, answer in zip(some, answers, strict=True):
        seen.statuses[answer.status] += 1
        if answer.hung:
            seen.hung.append(sent)
        elif answer.status >= 500 and answer.status != 503:
            seen.failed.append(sent)


def _stock_is_better(folder: Path, failed: list[Sent], most: int = 200) -> list[Sent]:
    """Those that stock SGLang answers with something below 500."""
    if not failed:
        return []

    async def again(url: str) -> list[Sent]:
        async with Client(url) as client:
            return [
                s for s in failed[:most] if 0 < (await client.ask(s.path, s.body, s.headers, 60)).status < 500
            ]

    with serving("stock", ["--max-total-tokens", "3000"], folder / "fuzz-stock.log") as server:
        return asyncio.run(again(server.url))
