"""Takes a running batch apart and puts it together again, always beside the one at hand, which stays as it was.

So whatever raises on the way, the batch that SGLang knows of is whole. Nothing that changes is shared: SGLang divides
what `DIVIDED` names when it filters and merges, and what it would change in place is copied first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_slo.runtime.requests import penalties
from sglang_slo.runtime.requests.features import names
from sglang_slo.runtime.requests.penalties import Penalties

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

# What SGLang divides, row by row or by asking the requests, when it filters and merges a batch and its sampling info.
DIVIDED = names(
    "reqs multimodal_inputs req_pool_indices req_pool_indices_cpu seq_lens seq_lens_cpu orig_seq_lens seq_lens_sum "
    "input_ids return_logprob top_logprobs_nums token_ids_logprobs has_grammar return_hidden_states "
    "return_hidden_states_mode sampling_info spec_info encoder_lens encoder_lens_cpu out_cache_loc is_prefill_only "
    "temperatures top_ps top_ks min_ps sampling_seed logit_bias penalizer_orchestrator return_sampling_masks "
    "sampling_mask_max_top_k has_custom_logit_processor custom_params custom_logit_processor is_all_greedy "
    "is_any_greedy need_top_p_sampling need_top_k_sampling need_min_p_sampling return_sampling_support_logprobs "
    "sampling_mask_batch_indices sampling_mask_top_ks sampling_support_logprobs_capture_indices max_top_k "
    "npu_top_k_top_p_eligible beam_tail"
)
# What belongs to the engine, is set for each iteration, or is of a mode that runs stock scheduling.
NOT_DIVIDED = names(
    "req_to_token_pool token_to_kv_pool_allocator tree_cache model_config enable_overlap device hisparse_coordinator "
    "batch_is_full chunked_req chunked_req_next_prompt_token contains_last_prefill_chunk inner_idle_batch "
    "decoding_reqs split_index split_prefill_finished split_forward_count split_forward_batch fpm_start_time "
    "hicache_consumer_index dp_cooperation_info prefill_stats forward_iter launch_ts prefill_input_ids_cpu "
    "mix_running_indices input_embeds replace_embeds replace_positions ne_token_table ne_skip_token_table_update "
    "out_cache_loc_dsv4 mamba_track_indices mamba_track_mask mamba_track_seqlens mamba_lazy_spec_track_positions_cpu "
    "mamba_cow_src_indices mamba_cow_dst_indices mamba_clear_indices encoder_out_cache_loc encoder_cached "
    "extend_input_logprob_token_ids forward_mode global_forward_mode is_extend_in_batch can_run_dp_cuda_graph "
    "can_run_dp_breakable_cuda_graph tbo_split_seq_index recv_skipper_forward_mode spec_verify_tier_num_tokens "
    "spec_algorithm extend_num_tokens dllm_config prefix_lens extend_lens extend_logprob_start_lens "
    "global_num_tokens global_num_tokens_for_logprob global_spec_verify_tier_num_tokens vocab_size grammars rids_int "
    "bootstrap_room_ids_int grammar_mask acc_additive_penalties acc_scaling_penalties after_idle_gap "
    "split_prefill_start prefill_chunk_processed mix_running_indices_cpu encoder_swa_reset engram_history "
    "engram_staged_rows can_run_decode_cuda_graph can_run_dp_draft_cuda_graph can_run_dp_prefill_cuda_graph "
    "dp_prefill_cuda_graph_max_prefix_len dp_balance_stats dp_spec_prefill_coordination_applied "
    "dp_spec_prefill_coordination_metadata draft_global_num_tokens draft_global_num_tokens_for_logprob "
    "mamba_decode_batch_idx_cpu mamba_prefill_track_mask_cpu mamba_track_buffer_indices mamba_track_mask_cpu "
    "mamba_track_mask_next_cpu mamba_track_seqlens_cpu watermark_keys watermark_context_windows watermark_enabled "
    "watermark_candidates_host has_watermark_candidates"
)


def can_split(batch: ScheduleBatch) -> bool:
    """Not with a penalty that this package does not know: only SGLang's own can be counted anew."""
    asked = batch.sampling_info.penalizer_orchestrator
    if not asked.is_required:
        return True
    return not any(p.is_prepared() for kind, p in asked.penalizers.items() if kind not in penalties.REBUILT)


def own_copy(batch: ScheduleBatch) -> ScheduleBatch:
    """The same requests in a batch that can be filtered and merged without the other one's noticing."""
    twin = _copy(batch)
    twin.spec_info = copy.copy(batch.spec_info)
    if batch.sampling_info is not None:
        twin.sampling_info = _copy(batch.sampling_info)
        twin.sampling_info.penalizer_orchestrator = Penalties(
            batch.sampling_info.penalizer_orchestrator, twin
        )
    return twin


def _copy(thing: Any) -> Any:
    """A copy with lists and dictionaries of its own; of tensors, SGLang changes those of penalties alone in place."""
    twin = copy.copy(thing)
    for name, value in vars(twin).items():
        if isinstance(value, list | dict):
            setattr(twin, name, value.copy())
    return twin


def without(batch: ScheduleBatch, places: np.ndarray) -> ScheduleBatch:
    """The batch without the requests at `places`, int[k]."""
    rest = own_copy(batch)
    rest.filter_batch(keep_indices=np.setdiff1d(np.arange(len(batch.reqs)), places).tolist())
    return rest


def divide(batch: ScheduleBatch, places: np.ndarray) -> tuple[ScheduleBatch, ScheduleBatch]:
    """The requests at `places`, int[k], as a batch of their own, and the rest.

    Both keep their KV, their place in the request pool and their last tokens (which SGLang keeps by request slot),
    so neither has to compute anything again.
    """
    part = own_copy(batch)
    part.filter_batch(keep_indices=np.sort(places).tolist())
    return part, without(batch, places)


def merged(batch: ScheduleBatch, part: ScheduleBatch) -> ScheduleBatch:
    """The union of two batches; of `part`, finished requests are left out. Neither must be used any more."""
    part = own_copy(part)
    part.filter_batch()
    if part.is_empty():
        return batch
    if batch.is_empty():
        return part
    whole = own_copy(batch)
    whole.merge_batch(part)
    return whole


def decode_batch(build: Callable[[list[Req]], ScheduleBatch], reqs: list[Req]) -> ScheduleBatch:
    """A batch of requests whose KV is on the device up to their last token, ready to decode.

    `build` is SGLang's. It builds one from requests without a prefill for its sparse cache (HiSparse) alone; what that
    builder needs is exactly what is there after a copy back.
    """
    batch = build(reqs)
    batch.multimodal_inputs = [req.multimodal_inputs for req in reqs]
    if batch.return_logprob:
        batch.top_logprobs_nums = [req.logprob.top_logprobs_num for req in reqs]
        batch.token_ids_logprobs = [req.logprob.token_ids_logprob for req in reqs]
    penalties.rebuild(batch)
    return batch


def correct_prefixes(batch: ScheduleBatch) -> None:
    """Say of a mixed batch's decodes how much of each is in the KV pool: all but the token it is about to compute.

    SGLang counts one token more under overlap scheduling, on the ground that every decode has one in flight. One
    that sat an iteration out, or has just come back from the host, has not.
    """
    decodes = len(batch.decoding_reqs or ())
    if decodes:
        batch.prefix_lens[-decodes:] = (batch.seq_lens_cpu[-decodes:] - 1).tolist()
