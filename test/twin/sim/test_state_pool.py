"""Recurrent states beside KV, in SGLang's own pools and tree: all are served, no pool leaks, limits are kept as without."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from crowded_pool import crowded
from invariants import Watched, check_nothing_left
from sglang_slo.runtime.sglang import pools
from sglang_slo.twin.result.run_result import RunResult
from sglang_slo.twin.sim import driver
from sglang_slo.twin.workloads.workload import Workload, load_workload

pytestmark = pytest.mark.skipif(not pools.WINDOWS, reason="runs on stock scheduling there")

# layers like Qwen3-Next's: three that keep a state, one that keeps KV
MODEL = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "full_attention_interval": 4,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 1,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "partial_rotary_factor": 0.25,
    "norm_topk_prob": True,
}
# the tree's states are copied from those of requests
COPIES = ["--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule"]


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norms are to lie on the CPU. Nothing is computed in the twin."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


class Closely(Watched):
    """`Watched`, with single slots looked at more often."""

    thorough_every = 10
    last: Any = None  # the scheduler

    def process_input_requests(self: Any, recv_reqs: list[Any]) -> None:
        Closely.last = self
        super().process_input_requests(recv_reqs)


def simulated(*args: Any, **kwargs: Any) -> RunResult:
    """`driver.run`. SGLang keeps where a model's experts are for the whole process: the next model has others."""
    from sglang.srt.eplb import expert_location

    expert_location.set_global_expert_location_metadata(None, allow_overwrite=True)
    try:
        return driver.run(*args, **kwargs)
    finally:
        expert_location.set_global_expert_location_metadata(None, allow_overwrite=True)


def run(workload: Workload, *flags: str) -> tuple[RunResult, Counter[str]]:
    """A run in which every invariant of each pool holds in every iteration, and its preemptions by way."""
    result = simulated(workload, "slo", list(flags), watcher=Closely, model=MODEL)
    s = Closely.last
    assert s.slo_on and s.is_hybrid_ssm
    assert result.requests.finished.all() and not result.fallbacks
    assert s.slo_observer.trouble.count == 0
    check_nothing_left(s)
    return result, s.slo_preempt.counts


def ample() -> Workload:
    return load_workload("mix-generated", max_requests=60)


def test_with_ample_kv_limits_are_kept_as_with_full_attention() -> None:
    result, preempted = run(ample(), *COPIES)
    assert not preempted.total()
    same = driver.run(ample(), "slo", ["--disable-overlap-schedule"])
    assert abs(result.attainment - same.attainment) <= 0.03


def test_with_kv_short_who_leaves_is_computed_again() -> None:
    """An unfinished request's state is not the tree's to keep: SGLang ends a server that is asked to."""
    bold = ("--slo-kv", "stock", "--schedule-conservativeness", "0.05", "--slo-max-preemptions", "8")
    _, preempted = run(crowded(3072), *COPIES, "--slo-preempt", "keep", *bold)
    assert preempted["recompute"] > 0 and not preempted["keep"]


def test_no_more_run_than_there_are_states_for() -> None:
    flags = ("--max-mamba-cache-size", "24", "--max-running-requests", "64")
    result, _ = run(crowded(16_384), *COPIES, *flags)
    assert Closely.last.req_to_token_pool.mamba_pool.size == 24
    assert result.requests.finished.all()


def test_prefixes_are_found_where_their_states_are_still_there() -> None:
    workload = load_workload("agent-generated", max_requests=40)
    workload = replace(workload, profile=replace(workload.profile, kv_capacity_tokens=60_000))
    result, _ = run(workload, *COPIES)
    assert result.requests.cached_tokens.sum() > 0
