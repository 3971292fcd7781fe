"""SGLang's flags beside ours: each is honoured, refused with a reason, or sends scheduling back to stock."""

from __future__ import annotations

import argparse
import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_slo.config import SloConfig
from sglang_slo.runtime.scheduler import flags
from sglang_slo.runtime.sglang.speculation import COVERED
from sglang_slo.runtime.sglang.supported import FLAGS_OF_SOME
from sglang_slo.runtime.sglang.tree import KNOWN_CACHES

OURS = SloConfig()


def server_args(**given: Any) -> SimpleNamespace:
    """SGLang's settings at their defaults, but for those given."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return SimpleNamespace(**{**vars(parser.parse_args(["--model-path", "x"])), **given})


def test_a_plain_server_is_ours() -> None:
    assert not flags.refusals(server_args(), OURS)
    assert not flags.stock_reasons(server_args(), OURS)


@pytest.mark.parametrize("page_size", [1, 16, 64, 128])
def test_pages_of_any_size_are_ours(page_size: int) -> None:
    assert not flags.refusals(server_args(page_size=page_size), OURS)
    assert not flags.stock_reasons(server_args(page_size=page_size), OURS)


@pytest.mark.parametrize(
    ("given", "flag", "honoured_with"),
    [
        ({"schedule_policy": "lpm"}, "--schedule-policy", {"order": "stock"}),
        ({"enable_priority_scheduling": True}, "--enable-priority-scheduling", {"order": "stock"}),
        ({"schedule_conservativeness": 0.3}, "--schedule-conservativeness", {"kv": "stock"}),
        ({"chunked_prefill_size": -1}, "--chunked-prefill-size", {"chunk": "fixed"}),
        ({"enable_mixed_chunk": True}, "--enable-mixed-chunk", {"mix": "auto"}),
        ({"enable_prefill_delayer": True}, "--enable-prefill-delayer", {"policy": "off"}),
        ({"prefill_decode_interval": 4}, "--prefill-decode-interval", {"policy": "off"}),
        ({"enable_http2": True, "tokenizer_worker_num": 2}, "--enable-http2", {"policy": "off"}),
    ],
)
def test_a_job_that_ours_does_is_refused_to_sglang_unless_ours_leaves_it(
    given: dict[str, Any], flag: str, honoured_with: dict[str, Any]
) -> None:
    config = SloConfig(mix="never") if "enable_mixed_chunk" in given else OURS
    (message,) = flags.refusals(server_args(**given), config)
    assert message.startswith(flag) and "--slo-" in message
    assert not flags.refusals(server_args(**given), SloConfig(**honoured_with))


def test_preempted_kv_goes_to_the_host_in_one_way_only() -> None:
    both = server_args(enable_hierarchical_cache=True)
    (message,) = flags.refusals(both, SloConfig(host_kv_gb=8.0))
    assert "--enable-hierarchical-cache" in message and "--slo-host-kv-gb" in message
    assert not flags.refusals(both, OURS) and not flags.stock_reasons(both, OURS)
    assert not flags.refusals(server_args(), SloConfig(host_kv_gb=8.0))


@pytest.mark.parametrize(
    "given",
    [
        {"pp_size": 2},
        {"disaggregation_mode": "prefill"},
        {"is_embedding": True},
        {"enable_dp_attention": True},
        {"attn_cp_size": 2},
        {"hicache_host_memory_mode": "buffer_only"},
        {"enable_lmcache": True},
        {"dllm_algorithm": "x"},
        {"enable_pdmux": True},
        {"enable_deterministic_inference": True},
        {"num_continuous_decode_steps": 4},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_mode_that_ours_does_not_cover_runs_stock_and_says_why(given: dict[str, Any]) -> None:
    assert len(flags.stock_reasons(server_args(**given), OURS)) == 1
    assert not flags.refusals(server_args(**given), OURS)


SPECULATES = {"speculative_algorithm": "EAGLE"}


@pytest.mark.parametrize("algorithm", ["EAGLE", "eagle3", "NEXTN", "STANDALONE", "NGRAM"])
def test_speculative_decoding_is_ours_where_sglang_tells_how_its_steps_may_be_mixed(algorithm: str) -> None:
    given = server_args(speculative_algorithm=algorithm)
    assert bool(flags.stock_reasons(given, OURS)) != COVERED
    assert not flags.refusals(given, OURS)


@pytest.mark.parametrize(
    "given",
    [
        {"speculative_algorithm": "DFLASH"},
        {"speculative_algorithm": "FROZEN_KV_MTP"},
        {"speculative_algorithm": "A_PLUGINS_OWN"},
        {**SPECULATES, "speculative_adaptive": True},
        {**SPECULATES, "enable_hierarchical_cache": True},
    ],
    ids=lambda given: "-".join(str(v) for v in given.values()),
)
def test_speculative_decoding_of_another_kind_runs_stock_and_says_why(given: dict[str, Any]) -> None:
    assert flags.stock_reasons(server_args(**given), OURS)


def test_a_draft_models_kv_is_not_left_behind() -> None:
    (message,) = flags.refusals(server_args(**SPECULATES), SloConfig(host_kv_gb=8.0))
    assert "--speculative-algorithm" in message and "--slo-host-kv-gb" in message


def test_what_sglang_cannot_mix_is_not_asked_to_be_mixed() -> None:
    asked = SloConfig(mix="always")
    assert flags.refusals(server_args(speculative_algorithm="NGRAM"), asked)
    assert not flags.refusals(server_args(speculative_algorithm="NGRAM"), OURS)
    assert not flags.refusals(server_args(**SPECULATES), asked)


def scheduler(**given: Any) -> SimpleNamespace:
    """A built scheduler, as far as `uncovered` looks."""
    usual = {
        "server_args": server_args(),
        "is_generation": True,
        "model_config": SimpleNamespace(is_encoder_decoder=False),
        "tree_cache": type(KNOWN_CACHES[0], (), {})(),
        "is_hybrid_swa": False,
        "is_hybrid_ssm": False,
    }
    return SimpleNamespace(**{**usual, **given})


def test_a_models_cache_decides_too() -> None:
    assert flags.uncovered(scheduler(), OURS) is None
    swa = type("SWARadixCache", (), {})()
    assert "SWARadixCache" in (flags.uncovered(scheduler(tree_cache=swa), OURS) or "")
    assert "no tokens" in (flags.uncovered(scheduler(is_generation=False), OURS) or "")
    assert "--slo-policy off" in (flags.uncovered(scheduler(), SloConfig(policy="off")) or "")


def test_the_table_names_real_flags_only() -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    known = set(parser._option_string_actions)
    known |= set(FLAGS_OF_SOME)
    known |= {"--slo-" + f.name.replace("_", "-") for f in dataclasses.fields(SloConfig)}
    named = set(re.findall(r"--[a-z][a-z0-9-]*", flags.markdown()))
    assert named and named <= known, named - known
