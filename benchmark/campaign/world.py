"""Small worlds for the scheduler, drawn from a seed: many short requests, pools that are too small for them, settings.

A request is a few dozen tokens in and a few out, so that many of them can be had; some share a prefix, some carry a
feature of SGLang's that keeps state beside the request (penalties, biases). Kinds of worlds: `lone` ones have one request
at a time, `crowded` ones a few dozen in a pool for a handful, `busy` ones hundreds in a pool for half of them.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sglang_slo.core.slo import Slo
from sglang_slo.twin.devices.profiles import load_profile
from sglang_slo.twin.workloads.workload import Workload

VOCAB = 4096  # penalties keep a float per request and word
LIMITS = {
    "tight": Slo(ttft_s=0.2, tbt_s=0.02),
    "chat": Slo(ttft_s=1.0, tbt_s=0.05),
    "loose": Slo(ttft_s=10.0, tbt_s=1.0),
    "first": Slo(ttft_s=0.5),
    "lost": Slo(ttft_s=1e-6, tbt_s=1e-6),
    "best-effort": Slo(),
}
# settings in which, between them, every way out and back, parking, shedding and stock's own rules are taken
SWAP = (
    "--slo-preempt",
    "swap",
    "--slo-host-kv-gb",
    "0.2",
    "--slo-kv",
    "stock",
    "--slo-max-preemptions",
    "50",
)
BOLD = ("--schedule-conservativeness", "0.05", "--max-running-requests", "64")
CORNERS: tuple[tuple[str, ...], ...] = (
    (*SWAP, *BOLD, "--chunked-prefill-size", "32"),
    (
        "--slo-preempt",
        "keep",
        "--slo-kv",
        "forecast",
        "--chunked-prefill-size",
        "8",
        *BOLD,
        "--slo-queue-limit-s",
        "0.2",
    ),
    ("--slo-preempt", "auto", "--slo-host-kv-gb", "0.2", "--slo-kv", "full", "--disable-overlap-schedule"),
    ("--slo-preempt", "stock", "--slo-order", "stock", "--slo-chunk", "fixed", "--slo-kv", "stock"),
)
FEATURES: tuple[dict[str, Any], ...] = (
    {"frequency_penalty": 0.5},
    {"presence_penalty": 0.5},
    {"repetition_penalty": 1.2},
    {"min_new_tokens": 2},
    {"logit_bias": {"7": 1.0}},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
    {"stop_token_ids": [9]},
    {"ignore_eos": False, "min_p": 0.1},
)


@dataclass(frozen=True)
class Kind:
    """What worlds of a kind are drawn from."""

    name: str
    pools: tuple[int, ...]  # tokens of KV
    alive: tuple[int, ...]  # requests that are kept in the scheduler
    running: tuple[int, ...]  # the most that SGLang runs at once
    chunks: tuple[int, ...]  # tokens


LONE = Kind("lone", (4096,), (1,), (4, 16, 64), (8, 32, 512))
CROWDED = Kind("crowded", (160, 320, 640), (6, 12, 24, 48), (4, 16, 64), (8, 32, 512))
BUSY = Kind("busy", (2048, 4096), (128, 256), (64, 256), (128, 512))
KINDS = (LONE, CROWDED, BUSY)


@dataclass(frozen=True)
class World:
    """One run's world. `alive`: how many requests are kept in the scheduler."""

    seed: int
    kind: Kind
    workload: Workload
    argv: tuple[str, ...]
    alive: int
    feature_share: float

    @property
    def name(self) -> str:
        """What is needed to see it again."""
        pool = self.workload.profile.kv_capacity_tokens
        return f"seed {self.seed}, {self.kind.name}, {pool} tokens of KV: {' '.join(self.argv)}"


def draw(
    seed: int, requests: int, kind: Kind = CROWDED, features: bool = True, also: tuple[str, ...] = ()
) -> World:
    """The world of `seed`; `also`: flags that overrule what is drawn."""
    rng, draws = random.Random(f"world {seed}"), np.random.default_rng(seed)
    pool = rng.choice(kind.pools)
    longest = min(pool // 4, 512)
    inputs = np.minimum(draws.geometric(1 / 24, requests) + 1, longest)
    outputs = np.minimum(draws.geometric(1 / 6, requests), longest)
    profile = replace(load_profile("h200-llama3-8b"), kv_capacity_tokens=pool)
    workload = Workload(
        name=f"campaign-{seed}",
        profile_name=profile.name,
        profile=profile,
        seed=seed,
        load=1.0,
        class_names=list(LIMITS),
        limits=list(LIMITS.values()),
        class_id=draws.integers(0, len(LIMITS), requests),
        arrival_s=np.zeros(requests),
        input_tokens=inputs,
        output_tokens=outputs,
        blocks=[None] * requests,
        declared_max_new_tokens=rng.choice([None, longest]),
        noise_sigma=rng.choice([0.0, 0.3]),
        predictor=rng.choice(["none", "mean", "noisy", "oracle"] if rng.random() < 0.9 else [None]),
    )
    alive = rng.choice(kind.alive)
    share = rng.choice([0.0, 0.25, 0.6]) if features else 0.0
    return World(seed, kind, workload, (*_settings(rng, kind, pool), *also), alive, share)


def _settings(rng: random.Random, kind: Kind, pool: int) -> list[str]:
    per_token = load_profile("h200-llama3-8b").kv_bytes_per_token
    host = rng.choice([0, pool // 4, pool, 4 * pool]) * per_token / 1e9
    argv = ["--slo-host-kv-gb", f"{host:.9f}"]
    argv += ["--slo-preempt", rng.choice(["auto", "swap", "swap", "keep", "recompute", "stock"])]
    argv += ["--chunked-prefill-size", str(rng.choice(kind.chunks))]
    argv += ["--max-running-requests", str(rng.choice(kind.running))]
    argv += ["--slo-max-preemptions", str(rng.choice([0, 1, 3, 50]))]
    argv += ["--slo-kv", rng.choice(["forecast", "forecast", "full", "stock"])]
    argv += ["--slo-mix", rng.choice(["auto", "auto", "always", "never"])]
    argv += ["--slo-order", rng.choice(["edf", "edf", "stock"])]
    argv += ["--slo-chunk", rng.choice(["dynamic", "dynamic", "fixed"])]
    argv += ["--slo-packing", rng.choice(["dual", "greedy"])]
    argv += ["--schedule-conservativeness", rng.choice(["0.05", "1.0"])]
    for flags, share in (
        (["--disable-overlap-schedule"], 0.25),
        (["--enable-priority-scheduling"], 0.1),
        (["--schedule-policy", "lpm"], 0.2),
        (["--slo-queue-limit-s", "0.5"], 0.2),
        (["--slo-decode-buckets", "off"], 0.1),
        (["--slo-park", "off"], 0.1),
    ):
        if rng.random() < share:
            argv += flags
    if rng.random() < 0.3 and "8" not in argv:  # SGLang's chunks are whole pages
        argv += ["--page-size", rng.choice(["2", "16"])]
    return argv


def prompt(world: World, i: int) -> array[int]:
    """Token ids of request i: a prefix that a few share, then its own."""
    rng = random.Random(f"prompt {world.seed} {i}")
    n = int(world.workload.input_tokens[i])
    shared = random.Random(rng.randrange(4)).choices(range(10, VOCAB), k=min(n // 2, 24))
    shared = shared if rng.random() < 0.5 else []
    return array("q", [*shared, *rng.choices(range(10, VOCAB), k=n - len(shared))])


def features(world: World, i: int) -> dict[str, Any]:
    """Sampling parameters of request i beside its length."""
    rng = random.Random(f"features {world.seed} {i}")
    return dict(rng.choice(FEATURES)) if rng.random() < world.feature_share else {}
