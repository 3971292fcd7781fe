"""Pools are counted one by one, and only such as are known: others run on stock scheduling, by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_slo.runtime.sglang import pools

here = pytest.mark.skipif(not pools.WINDOWS, reason="runs on stock scheduling there")


def built(kind: str, slots: str, kv: str, rows: str, **given: Any) -> SimpleNamespace:
    """A scheduler with pools of these types, as far as `unknown` looks."""
    usual: dict[str, Any] = {"ring": False, "tree": True, "host": False, "varies": False}
    usual.update({"noted": False, "replayed": None, "small": None, "drafts": False})
    usual.update(given)
    pool = type(kv, (), {})()
    return SimpleNamespace(
        is_hybrid_swa="windows" in kind,
        is_hybrid_ssm="states" in kind,
        token_to_kv_pool_allocator=type(
            slots, (), {"get_kvcache": lambda self: pool, "swa_req_ring": usual["ring"]}
        )(),
        req_to_token_pool=type(
            rows,
            (),
            {
                "enable_mamba_extra_buffer": usual["noted"],
                "mamba_pool": SimpleNamespace(replayssm_write_pos=usual["replayed"]),
                "mamba_ckpt_pool": usual["small"],
            },
        )(),
        tree_cache=SimpleNamespace(
            supports_prefix_sharing=lambda: usual["tree"], supports_auxiliary_swa=lambda: False
        ),
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(prefill_aware_swa=usual["varies"])),
        enable_hierarchical_cache=usual["host"],
        spec_algorithm=SimpleNamespace(is_none=lambda: not usual["drafts"]),
    )


WINDOWS = ("windows", "SWATokenToKVPoolAllocator", "SWAKVPool", "ReqToTokenPool")
STATES = ("states", "TokenToKVPoolAllocator", "HybridLinearKVPool", "HybridReqToTokenPool")


def test_one_pool_alone_is_always_known() -> None:
    assert pools.unknown(built("", "AnyAllocator", "AnyPool", "AnyRows")) is None


@here
@pytest.mark.parametrize("known", [WINDOWS, STATES], ids=lambda known: known[0])
def test_pools_of_a_fixed_size_beside_a_tree_are_known(known: tuple[str, str, str, str]) -> None:
    assert pools.unknown(built(*known)) is None


@here
@pytest.mark.parametrize(
    ("known", "given"),
    [
        (WINDOWS, {"ring": True}),
        (WINDOWS, {"varies": True}),
        (WINDOWS, {"tree": False}),
        (WINDOWS, {"host": True}),
        (WINDOWS, {"drafts": True}),
        (STATES, {"tree": False}),
        (STATES, {"host": True}),
        (STATES, {"small": object()}),
        (STATES, {"noted": True}),
        (STATES, {"replayed": object()}),
        (STATES, {"drafts": True}),
        (("windows", "UnifiedSWATokenToKVPoolAllocator", *WINDOWS[2:]), {}),
        (("windows", WINDOWS[1], "DeepSeekV4TokenToKVPool", WINDOWS[3]), {}),
        (("states", "UnifiedMambaTokenToKVPoolAllocator", *STATES[2:]), {}),
        (("windows and states", *WINDOWS[1:3], STATES[3]), {}),
    ],
)
def test_others_are_not_and_are_named(known: tuple[str, str, str, str], given: dict[str, Any]) -> None:
    reason = pools.unknown(built(*known, **given)) or ""
    assert ("sliding windows" in reason) == ("windows" in known[0])
    assert ("recurrent states" in reason) == ("states" in known[0])


def test_each_pool_is_counted_alone() -> None:
    slots = SimpleNamespace(
        full_available_size=lambda: 100, swa_available_size=lambda: 20, available_size=lambda: 20
    )
    tree = SimpleNamespace(
        full_evictable_size=lambda: 7, swa_evictable_size=lambda: 3, evictable_size=lambda: 7
    )
    assert pools.free_tokens(slots, tree) == 107
    assert pools.window_free_tokens(slots, tree) == 23
    assert pools.least_free_tokens(slots, tree) == 23
    single = SimpleNamespace(available_size=lambda: 20)
    assert pools.free_tokens(single, tree) == pools.least_free_tokens(single, tree) == 27
