"""Takes a running batch apart, so that some of its requests can sit an iteration out, and puts it together again."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


def can_split(batch: ScheduleBatch) -> bool:
    """Penalties and custom processors keep per-batch state that cannot be divided."""
    info = batch.sampling_info
    return not (info.penalizer_orchestrator.is_required or info.has_custom_logit_processor)


def split(batch: ScheduleBatch, positions: np.ndarray) -> ScheduleBatch:
    """Take the requests at `positions` out of `batch` and return them as a batch of their own.

    Both keep their KV, their place in the request pool and their last tokens (which SGLang keeps by request slot),
    so neither has to compute anything again.
    """
    part = copy.copy(batch)
    part.sampling_info = copy.copy(batch.sampling_info)
    keep = np.sort(positions)
    rest = np.setdiff1d(np.arange(len(batch.reqs)), keep)
    part.filter_batch(keep_indices=keep.tolist())
    batch.filter_batch(keep_indices=rest.tolist())
    return part


def merge(batch: ScheduleBatch, part: ScheduleBatch) -> ScheduleBatch:
    """The union of two batches; finished requests are left out."""
    part.filter_batch()
    if part.is_empty():
        return batch
    if batch.is_empty():
        return part
    batch.merge_batch(part)
    return batch


def correct_prefixes(batch: ScheduleBatch) -> None:
    """Say of a mixed batch's decodes how much of each is in the KV pool: all but the token it is about to compute.

    SGLang counts one token more under overlap scheduling, on the ground that every decode has one in flight. One
    that sat an iteration out, or has just come back from the host, has not.
    """
    decodes = len(batch.decoding_reqs or ())
    if decodes:
        batch.prefix_lens[-decodes:] = (batch.seq_lens_cpu[-decodes:] - 1).tolist()
