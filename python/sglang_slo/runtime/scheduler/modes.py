"""The table of SGLang's flags and modes: honoured, refused with a reason, or run on stock scheduling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_slo.config import SloConfig
from sglang_slo.core.orders import ORDERS

Test = Callable[[Any, SloConfig], Any]

HONOURED, REFUSED, STOCK = "honoured", "refused", "stock scheduling"


@dataclass(frozen=True)
class Row:
    """One line of the table. `applies(server_args, config)` is true if the server was started so."""

    flags: str
    what: str
    why: str
    applies: Test | None = None  # None: documentation only


def _is(name: str, unset: Any = None) -> Test:
    """True if SGLang's setting `name` was given another value than `unset` (None: any true value)."""
    return lambda args, config: getattr(args, name, unset) not in (unset, None, False)


UNMIXED = ("NGRAM", "STANDALONE")
SPECULATES = ("EAGLE", "EAGLE3", "NEXTN", *UNMIXED)  # NEXTN: EAGLE with the draft that a model brings (MTP)


def _speculates(args: Any, *algorithms: str) -> bool:
    return str(args.speculative_algorithm or "").upper() in algorithms


OUR_ORDERS = tuple(name for name in ORDERS if name != "stock")


def _needs(name: str, unset: Any, part: str, *ours: str) -> Test:
    """True if `name` was given while our own `part` of the scheduler, at a setting of `ours`, does that job."""
    given = _is(name, unset)
    return lambda args, config: given(args, config) and getattr(config, part) in ours


TABLE = (
    # -- jobs that ours takes over
    Row(
        "--schedule-policy",
        REFUSED,
        "the queue is ordered by deadline; SGLang's order comes back with --slo-order stock",
        _needs("schedule_policy", "fcfs", "order", *OUR_ORDERS),
    ),
    Row(
        "--schedule-conservativeness",
        REFUSED,
        "admission goes by a forecast of KV; SGLang's ratio comes back with --slo-kv stock",
        _needs("schedule_conservativeness", 1.0, "kv", "forecast"),
    ),
    Row(
        "--enable-priority-scheduling",
        REFUSED,
        "a deadline says who goes first; SGLang's priorities come back with --slo-order stock",
        _needs("enable_priority_scheduling", False, "order", *OUR_ORDERS),
    ),
    Row(
        "--enable-prefill-delayer",
        REFUSED,
        "when to prefill is decided by the limits of those that decode",
        _is("enable_prefill_delayer", False),
    ),
    Row(
        "--prefill-decode-interval, --min-free-slots-delay",
        REFUSED,
        "when to prefill is decided by the limits of those that decode",
        lambda args, config: (
            _is("prefill_decode_interval", 0)(args, config) or (args.min_free_slots_delay or 1) > 1
        ),
    ),
    Row(
        "--chunked-prefill-size -1",
        REFUSED,
        "a prompt must be cut to keep gaps short; needs --slo-chunk fixed",
        lambda args, config: (args.chunked_prefill_size or 0) < 0 and config.chunk == "dynamic",
    ),
    Row(
        "--enable-mixed-chunk",
        REFUSED,
        "contradicts --slo-mix never",
        _needs("enable_mixed_chunk", False, "mix", "never"),
    ),
    Row("--chunked-prefill-size N", HONOURED, "the largest chunk; with --slo-chunk fixed, the chunk"),
    Row("--enable-mixed-chunk", HONOURED, "--slo-mix auto decides each iteration, with or without it"),
    Row(
        "--max-running-requests, --max-total-tokens, --max-prefill-tokens", HONOURED, "bounds on every batch"
    ),
    Row("--max-queued-requests", HONOURED, "SGLang refuses at the door, before ours sees the request"),
    Row(
        "--disable-radix-cache",
        HONOURED,
        "who is set aside half-prefilled keeps its KV until that is needed; who is preempted is swapped or computed again",
    ),
    Row(
        "--page-size N",
        HONOURED,
        "KV is counted in whole pages; a cut prompt ends with a page where that costs less than half of the piece",
    ),
    Row(
        "--enable-hierarchical-cache",
        HONOURED,
        "KV found in host memory is loaded where the limits of those that decode leave the time for it, else computed",
    ),
    Row(
        "--enable-hierarchical-cache with --slo-host-kv-gb > 0",
        REFUSED,
        "both would copy the KV of preempted requests to host memory",
        lambda args, config: bool(args.enable_hierarchical_cache) and config.host_kv_gb > 0,
    ),
    Row(
        "--speculative-algorithm EAGLE, EAGLE3, NEXTN, STANDALONE, NGRAM",
        HONOURED,
        "the tokens of a step are one delivery, gaps lie between deliveries; KV is counted as SGLang keeps it for two steps",
    ),
    Row(
        "--speculative-algorithm NGRAM, STANDALONE with --slo-mix always",
        REFUSED,
        "SGLang cannot mix these decodes with prefill",
        lambda args, config: config.mix == "always" and _speculates(args, *UNMIXED),
    ),
    Row(
        "--speculative-algorithm with --slo-host-kv-gb > 0",
        REFUSED,
        "the draft model's KV would stay behind: preempted requests are computed again",
        lambda args, config: _speculates(args, *SPECULATES) and config.host_kv_gb > 0,
    ),
    Row("--disable-overlap-schedule", HONOURED, "an iteration is then planned with nothing in flight"),
    Row("--tp-size, --dp-size, --enable-lora, grammars, logprobs, sessions", HONOURED, "SGLang's own"),
    # -- ways in that bypass the HTTP side
    Row(
        "SGLANG_RUST_SERVER=1",
        REFUSED,
        "its HTTP server is not Python's: deadlines would be dropped unseen",
        lambda args, config: _rust_server(),
    ),
    Row(
        "--enable-http2 with --tokenizer-worker-num > 1",
        REFUSED,
        "its workers are started where deadlines cannot be read",
        lambda args, config: args.enable_http2 and args.tokenizer_worker_num > 1,
    ),
    Row(
        "--smg-grpc-mode, --grpc-port",
        HONOURED,
        "limits travel in custom_params only; the server's defaults apply to the rest",
    ),
    # -- modes that ours does not cover yet
    Row(
        "--speculative-algorithm on an SGLang that mixes no speculative decodes with prefill (0.5.17)",
        STOCK,
        "it has not been tried there",
        lambda args, config: bool(args.speculative_algorithm) and not _covered(),
    ),
    Row(
        "--speculative-algorithm DFLASH, DSPARK, UNO, FROZEN_KV_MTP, or one that a plugin brings",
        STOCK,
        "each prepares its steps in a way of its own, with state in the batch",
        lambda args, config: bool(args.speculative_algorithm) and not _speculates(args, *SPECULATES),
    ),
    Row(
        "--speculative-adaptive",
        STOCK,
        "how many tokens a step computes changes from step to step",
        lambda args, config: (
            bool(args.speculative_algorithm) and bool(getattr(args, "speculative_adaptive", False))
        ),
    ),
    Row(
        "--speculative-algorithm with --enable-hierarchical-cache",
        STOCK,
        "the draft model's KV moves to the host and back beside the model's",
        lambda args, config: bool(args.speculative_algorithm) and bool(args.enable_hierarchical_cache),
    ),
    Row("--pp-size > 1", STOCK, "several batches are in flight", _is("pp_size", 1)),
    Row(
        "--disaggregation-mode prefill/decode",
        STOCK,
        "prefill and decode run on different servers",
        _is("disaggregation_mode", "null"),
    ),
    Row("--is-embedding, reward models", STOCK, "no tokens come out", _is("is_embedding", False)),
    Row(
        "--enable-dp-attention",
        STOCK,
        "replicas must form batches in step",
        lambda args, config: args.enable_dp_attention or getattr(args, "attn_dp_size", 1) > 1,
    ),
    Row(
        "context parallelism (--attn-cp-size, --dcp-size)",
        STOCK,
        "chunks are cut by rank",
        lambda args, config: args.attn_cp_size > 1 or args.dcp_size > 1,
    ),
    Row(
        "--hicache-host-memory-mode buffer_only",
        STOCK,
        "KV arrives from storage at its own time",
        _is("hicache_host_memory_mode", "cache"),
    ),
    Row(
        "--enable-lmcache, --enable-flexkv, --enable-hisparse",
        STOCK,
        "KV is kept elsewhere",
        lambda args, config: args.enable_lmcache or args.enable_flexkv or args.enable_hisparse,
    ),
    Row(
        "--enable-unified-cache-external-linker",
        STOCK,
        "KV is kept elsewhere",
        _is("enable_unified_cache_external_linker", False),
    ),
    Row(
        "--chunked-prefill-size -1 with --slo-chunk fixed",
        STOCK,
        "prompts are never cut",
        lambda args, config: (args.chunked_prefill_size or 0) < 0,
    ),
    Row(
        "--enable-watermark",
        STOCK,
        "a token's mark is drawn from those before it in the iterations that its request was in",
        _is("enable_watermark", False),
    ),
    Row("--dllm-algorithm", STOCK, "a diffusion model fills blocks of tokens", _is("dllm_algorithm")),
    Row("--enable-pdmux", STOCK, "prefill and decode share the GPU by streams", _is("enable_pdmux", False)),
    Row(
        "--enable-deterministic-inference",
        STOCK,
        "chunks must end at fixed places",
        _is("enable_deterministic_inference", False),
    ),
    Row(
        "--prefill-only-disable-kv-cache, --enable-mis",
        STOCK,
        "no KV is kept, or several prompts share one",
        lambda args, config: args.prefill_only_disable_kv_cache or args.enable_mis,
    ),
    Row(
        "--num-continuous-decode-steps > 1",
        STOCK,
        "decisions are skipped",
        _is("num_continuous_decode_steps", 1),
    ),
    Row(
        "models with sliding windows (gpt-oss, Llama 4, Gemma 4), SGLang 0.5.23",
        HONOURED,
        "each pool of KV has a forecast of its own; nobody is swapped: --slo-host-kv-gb has no effect",
    ),
    Row(
        "models with recurrent states (Qwen3-Next, Qwen3.5, Nemotron-H, Kimi-Linear) with "
        "--mamba-radix-cache-strategy no_buffer, SGLang 0.5.23",
        HONOURED,
        "no more run than their pool has states for; who gives up KV is computed again, and nobody is swapped",
    ),
    Row(
        "these models with extra_buffer (SGLang's choice on GPUs), --enable-linear-replayssm, --enable-int8-mamba-checkpoint",
        STOCK,
        "a request holds more states than one, or the prefix tree keeps others",
    ),
    Row(
        "these models on SGLang 0.5.17",
        STOCK,
        "each kind of pool has a prefix tree of its own there",
    ),
    Row(
        "these models with --disable-radix-cache, --enable-hierarchical-cache, --speculative-algorithm or pools that "
        "share memory; DeepSeek-V4",
        STOCK,
        "KV is given back in other ways there",
    ),
    Row("encoder-decoder models", STOCK, "KV is kept for two sequences"),
)


def _covered() -> bool:
    from sglang_slo.runtime.sglang.speculation import COVERED

    return COVERED


def _rust_server() -> bool:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_RUST_SERVER.get())
