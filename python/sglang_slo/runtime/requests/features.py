"""What may be done to a request, by the features of SGLang that it uses: one table, read once at arrival.

Each line of `TABLE` says which of SGLang's fields switch a feature on, what must then not be done to the request, and
why. `PLAIN` names the fields that change nothing of the kind. A test compares both with SGLang's own definitions, so
that a feature of a newer SGLang is looked at before it is scheduled. A penalty that is in neither is found by asking
SGLang whether the request requires it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling import penaltylib
from sglang.srt.sampling.penaltylib.orchestrator import BatchedPenalizerOrchestrator

from sglang_slo.runtime.requests.penalties import REBUILT

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

Noting = Callable[[str], AbstractContextManager[None]]
Req.slo_permits = None  # what may be done to it, once it was asked


@dataclass(frozen=True, slots=True)
class Permits:
    """What may be done to a request."""

    mix: bool = True  # its prefill may share an iteration with decodes, its decodes with prefill
    split: bool = True  # the batch it decodes in may be taken apart
    cut: bool = True  # its prompt may be computed in pieces
    park: bool = True  # it may be set aside half-prefilled
    keep: bool = True  # it may be preempted, its KV left in the radix tree
    swap: bool = True  # it may be preempted, its KV copied to the host
    recompute: bool = True  # it may be preempted, its KV thrown away

    def __and__(self, other: Permits) -> Permits:
        """What both permit."""
        return Permits(*(getattr(self, f.name) and getattr(other, f.name) for f in fields(self)))

    @property
    def leave(self) -> bool:
        """Whether it may be preempted at all: a swap that fails ends in recomputing."""
        return self.keep and self.recompute


ALL = Permits()
STAYS = Permits(keep=False, swap=False, recompute=False)


@dataclass(frozen=True)
class Feature:
    """A feature of SGLang's requests: the fields that bring it in, whether a request has it, what that permits."""

    what: str
    names: frozenset[str]
    has: Callable[[Req], Any]
    permits: Permits
    why: str


def _feature(what: str, fields: str, has: Callable[[Req], Any], permits: Permits, why: str) -> Feature:
    return Feature(what, frozenset(fields.split()), has, permits, why)


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def _wants_input_logprobs(req: Req) -> bool:
    return req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids)


TABLE = (
    _feature(
        "log-probabilities",
        "return_logprob top_logprobs_num token_ids_logprob return_flat_raw_output_top_logprobs",
        lambda req: req.return_logprob,
        Permits(mix=False),
        "SGLang does not compute them in a mixed batch",
    ),
    _feature(
        "log-probabilities of the prompt",
        "logprob_start_len return_flat_raw_top_logprobs",
        _wants_input_logprobs,
        Permits(mix=False, cut=False, park=False),
        "what the pieces before a pause gave is forgotten, and the cache may not be used for them",
    ),
    _feature(
        "hidden states",
        "return_hidden_states",
        lambda req: req.return_hidden_states,
        Permits(mix=False, cut=False, park=False),
        "only the last piece's are kept; a decode in a mixed batch is wrapped once more than in one of decodes",
    ),
    _feature(
        "sparse sampling support",
        "return_sampling_mask sampling_logprobs_mode",
        lambda req: req.return_sampling_mask,
        Permits(mix=False),
        "its rows follow the batch of decodes",
    ),
    _feature(
        "routed experts, indexer choices",
        "return_routed_experts routed_experts_start_len return_indexer_topk",
        lambda req: req.return_routed_experts or req.return_indexer_topk,
        Permits(swap=False),
        "they are kept by place in the KV pool: any pieces will do, but KV that comes back lies elsewhere",
    ),
    _feature(
        "a prompt of embeddings",
        "input_embeds",
        lambda req: req.input_embeds is not None,
        Permits(mix=False, cut=False, park=False, keep=False, swap=False, recompute=False),
        "SGLang begins such a request anew when it is preempted, output and all",
    ),
    _feature(
        "embeddings in the place of tokens",
        "positional_embed_overrides token_type_ids",
        lambda req: req.positional_embed_overrides is not None or req.token_type_ids is not None,
        Permits(mix=False, cut=False, park=False, keep=False, swap=False, recompute=False),
        "nothing of it may be found in the cache again, nor stay there",
    ),
    _feature(
        "images, video, audio",
        "mm_inputs multimodal_inputs image_data video_data audio_data mm_hashes use_audio_in_video modalities "
        "need_wait_for_mm_inputs num_items_assigned mm_data_mooncake encoder_urls max_dynamic_patch "
        "min_dynamic_patch image_max_dynamic_patch video_max_dynamic_patch images_config mm_content_hashes "
        "mm_processor_kwargs video_config",
        lambda req: req.multimodal_inputs is not None,
        Permits(mix=False, cut=False, park=False, keep=False, swap=False, recompute=False),
        "tokens of one image attend to each other; SGLang lengthens the positions at each look-up after a preemption",
    ),
    _feature(
        "a session",
        "session session_id session_params",
        lambda req: req.session is not None,
        Permits(swap=False),
        "the session holds part of the KV",
    ),
    _feature(
        "an adapter",
        "lora_id lora_path lora_name",
        lambda req: req.lora_id is not None,
        Permits(swap=False),
        "it must have a slot when it comes back, which only SGLang's prefill sees to",
    ),
    _feature(
        "several items scored in one prompt",
        "multi_item_delimiter_indices token_indices_to_pool decision_layout",
        lambda req: any(
            getattr(req, name, None) is not None
            for name in ("multi_item_delimiter_indices", "token_indices_to_pool", "decision_layout")
        ),
        Permits(mix=False, cut=False, park=False, keep=False, swap=False, recompute=False),
        "items are told apart by their places in one piece",
    ),
    _feature(
        "a diffusion model's blocks",
        "dllm_config",
        lambda req: req.is_dllm(),
        Permits(mix=False, split=False, cut=False, park=False, keep=False, swap=False, recompute=False),
        "such a server runs stock scheduling",
    ),
    _feature(
        "a beam search",
        "beam_width",
        lambda req: getattr(req, "beam_group", None) is not None,
        Permits(mix=False, split=False, park=False, keep=False, swap=False, recompute=False),
        "its beams hold rows and KV of their own behind one request",
    ),
    _feature(
        "a penalty",
        "frequency_penalty presence_penalty repetition_penalty min_new_tokens",
        lambda req: False,  # what it has counted follows from the output (`penalties`)
        ALL,
        "counted anew from the output wherever a batch is divided or built",
    ),
    _feature(
        "a grammar",
        "json_schema regex ebnf ebnf_full_assistant structural_tag require_reasoning max_thinking_tokens",
        lambda req: False,
        ALL,
        "its state is the request's own and moves with the tokens that are kept",
    ),
    _feature(
        "a custom logit processor, a logit bias",
        "custom_logit_processor custom_params logit_bias",
        lambda req: False,
        ALL,
        "SGLang builds them from the requests and divides them row by row",
    ),
)

# Fields that change nothing of what may be done.
PLAIN = names(
    "rid text input_text input_ids origin_input_text origin_input_ids origin_input_ids_unpadded sampling_params "
    # how long, how drawn, when it stops, how it is shown
    "max_new_tokens stop stop_token_ids stop_regex stop_strs stop_regex_strs stop_str_max_len stop_regex_max_len "
    "ignore_eos eos_token_ids temperature top_p top_k min_p n sampling_seed is_normalized stream stream_interval "
    "skip_special_tokens spaces_between_special_tokens no_stop_trim return_text_in_logprobs return_bytes "
    "return_flat_raw_top_logprobs_b64 return_entropy return_prompt_token_ids vocab_size "
    # whose it is, where it came from and goes to
    "log_metrics no_logs custom_labels external_trace_header received_time time_stats metrics_collector "
    "http_worker_ipc conversation_id routing_key extra_key cache_salt priority background routed_dp_rank "
    "data_parallel_rank kv_hints "
    # modes that run stock scheduling: disaggregation, pipelines, embedding models, watermarks
    "watermark pp_prefetch_ticketed "
    "bootstrap_host bootstrap_port bootstrap_room bootstrap_pair_key decode_tp_size disagg_prefill_dp_rank "
    "disagg_mode dimensions return_pooled_hidden_states"
)


def has_grammar(req: Req) -> bool:
    """Whether what it writes is held to a grammar, compiled or not."""
    params = req.sampling_params
    return any((params.json_schema, params.regex, params.ebnf, params.structural_tag))


def of(req: Req) -> Permits:
    """What may be done to `req`."""
    if req.slo_permits is None:
        req.slo_permits = _permits(req)
    return req.slo_permits


def _permits(req: Req) -> Permits:
    permits = ALL
    for feature in TABLE:
        if feature.has(req):
            permits &= feature.permits
    if unknown_penalties(req):
        permits &= Permits(mix=False, split=False, keep=False, swap=False, recompute=False)
    return permits


def penalizers() -> set[type]:
    """SGLang's kinds of penalty."""
    kinds = (getattr(penaltylib, name) for name in penaltylib.__all__)
    return {kind for kind in kinds if not issubclass(kind, BatchedPenalizerOrchestrator)}


def unknown_penalties(req: Req) -> list[type]:
    """Kinds of penalty that the request requires and that cannot be counted anew."""
    unknown = penalizers() - REBUILT.keys()
    if not unknown:
        return []
    alone: Any = _Alone([req])
    asked = BatchedPenalizerOrchestrator(0, alone, set())
    return [kind for kind in unknown if kind(asked).is_required()]


class _Alone:
    """What SGLang's penalties see of a batch when they are asked."""

    device = "cpu"

    def __init__(self, reqs: list[Req]) -> None:
        self.reqs = reqs


# -- what SGLang keeps twice


def prefilled_again(batch: ScheduleBatch) -> list[tuple[Req, int]]:
    """The requests of a prefill batch that have written before and want hidden states, and how many rows each has."""
    if not batch.return_hidden_states or not batch.forward_mode.is_extend():
        return []
    decoding = set(batch.decoding_reqs or ())
    return [
        (req, len(req.hidden_states))
        for req in batch.reqs
        if req.return_hidden_states and len(req.output_ids) and req not in decoding
    ]


def drop_repeated(again: Iterable[tuple[Req, int]]) -> None:
    """Of what a second prefill appended to the hidden states, keep the row of the new token only."""
    for req, before in again:
        if len(req.hidden_states) <= before:
            continue
        rows = req.hidden_states[-1]
        if rows and isinstance(rows[0], list):  # the whole piece's
            req.hidden_states[-1] = rows[-1]
        elif req.return_hidden_states == "last":
            del req.hidden_states[:before]


def even_out(result: Any) -> None:
    """Make what SGLang takes for granted true: log-probabilities of named tokens are tensors for all of a batch.

    For those who named none it leaves an empty list, which ends the scheduler when it is read as a tensor.
    """
    output = getattr(result, "logits_output", None)
    values = getattr(output, "next_token_token_ids_logprobs_val", None)
    if output is not None and values:
        named = [v if isinstance(v, torch.Tensor) else torch.tensor(v) for v in values]
        output.next_token_token_ids_logprobs_val = named


@contextlib.contextmanager
def made_true(batch: ScheduleBatch, result: Any, noting: Noting) -> Iterator[None]:
    """Around SGLang's processing of a result: what it takes for granted holds, and it repeats nothing."""
    again: list[tuple[Req, int]] = []
    with noting("what a result holds"):
        even_out(result)
        again = prefilled_again(batch)
    yield
    with noting("hidden states"):
        drop_repeated(again)
