"""Which of SGLang's modes our scheduling does not cover; there, stock scheduling runs and says so."""

from __future__ import annotations

from typing import Any


def uncovered(scheduler: Any) -> str | None:
    """The first mode of a built scheduler that is not covered, None if all are."""
    args = scheduler.server_args
    checks = [
        (scheduler.slo_config.policy == "off", "--slo-policy off"),
        (not scheduler.is_generation, "an embedding or reward model"),
        (not scheduler.spec_algorithm.is_none(), "speculative decoding"),
        (scheduler.ps.pp_size > 1, "pipeline parallelism"),
        (args.disaggregation_mode != "null", "prefill/decode disaggregation"),
        (scheduler.is_hybrid_swa or scheduler.is_hybrid_ssm, "a hybrid or sliding-window cache"),
        (scheduler.enable_hierarchical_cache, "the hierarchical cache"),
        (scheduler.dllm_config is not None, "a diffusion language model"),
        (args.enable_dp_attention, "data-parallel attention"),
        (scheduler.enable_pdmux, "PD multiplexing"),
        (scheduler.page_size != 1, "a page size above 1"),
        (scheduler.disable_radix_cache, "a disabled radix cache"),
        (scheduler.chunked_prefill_size is None, "disabled chunked prefill"),
    ]
    return next((name for hit, name in checks if hit), None)
