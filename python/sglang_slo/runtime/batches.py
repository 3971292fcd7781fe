"""Takes a running batch apart and puts it together again, always beside the one at hand, which stays as it was.

So whatever raises on the way, the batch that SGLang knows of is whole.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


def can_split(batch: ScheduleBatch) -> bool:
    """Penalties and custom processors keep per-batch state that cannot be divided."""
    info = batch.sampling_info
    return not (info.penalizer_orchestrator.is_required or info.has_custom_logit_processor)


def own_copy(batch: ScheduleBatch) -> ScheduleBatch:
    """The same requests in a batch that can be filtered and merged without the other one's noticing."""
    twin = copy.copy(batch)
    twin.sampling_info = copy.copy(batch.sampling_info)
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


def decode_batch(scheduler: Any, reqs: list[Req]) -> ScheduleBatch:
    """A batch of requests whose KV is on the device up to their last token, ready to decode.

    SGLang builds one from requests without a prefill for its sparse cache (HiSparse) alone; what that builder needs is
    exactly what is there after a copy back.
    """
    batch: ScheduleBatch = scheduler._build_hisparse_decode_batch(reqs)
    batch.multimodal_inputs = [req.multimodal_inputs for req in reqs]
    if batch.return_logprob:
        batch.top_logprobs_nums = [req.logprob.top_logprobs_num for req in reqs]
        batch.token_ids_logprobs = [req.logprob.token_ids_logprob for req in reqs]
    return batch


def correct_prefixes(batch: ScheduleBatch) -> None:
    """Say of a mixed batch's decodes how much of each is in the KV pool: all but the token it is about to compute.

    SGLang counts one token more under overlap scheduling, on the ground that every decode has one in flight. One
    that sat an iteration out, or has just come back from the host, has not.
    """
    decodes = len(batch.decoding_reqs or ())
    if decodes:
        batch.prefix_lens[-decodes:] = (batch.seq_lens_cpu[-decodes:] - 1).tolist()
