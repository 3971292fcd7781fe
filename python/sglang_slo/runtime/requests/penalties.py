"""SGLang's penalties, counted by how far each request has come instead of by how often it was in a batch.

SGLang feeds a penalty the last token it knows whenever a batch decodes, and starts from nothing when a batch is built
anew. A request that sat an iteration out would skip a token, one that was preempted would forget all of them. Here
both follow from the request alone: before it makes its output token t, it is penalised for exactly the tokens that
SGLang, serving it alone, would have fed by then. Under overlap scheduling that is one fewer than there are, after the
last token of the prompt.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.sampling import penaltylib
from sglang.srt.sampling.penaltylib.orchestrator import BatchedPenalizerOrchestrator
from sglang.srt.utils.common import is_pin_memory_available

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


def _frequency(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    weights = penalizer.frequency_penalties[row].expand(len(tokens))
    penalizer.cumulated_frequency_penalties[row].scatter_add_(0, tokens, weights)


def _presence(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    weights = penalizer.presence_penalties[row].expand(len(tokens))
    penalizer.cumulated_presence_penalties[row].scatter_(0, tokens, weights)


def _repetition(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    weights = penalizer.repetition_penalties[row].expand(len(tokens))
    penalizer.cumulated_repetition_penalties[row].scatter_(0, tokens, weights)


def _min_new(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    penalizer.len_output_tokens[row] += len(tokens)


# How each of SGLang's penalties takes many tokens of one request at once; a kind that is missing here is never
# taken out of a running batch (`features`).
REBUILT: dict[type, Callable[[Any, int, torch.Tensor], None]] = {
    penaltylib.BatchedFrequencyPenalizer: _frequency,
    penaltylib.BatchedPresencePenalizer: _presence,
    penaltylib.BatchedRepetitionPenalizer: _repetition,
    penaltylib.BatchedMinNewTokensPenalizer: _min_new,
}


class Penalties(BatchedPenalizerOrchestrator):
    """The penalties of one batch and of no other: a copy of `theirs` that reads its requests from `batch`."""

    def __init__(self, theirs: BatchedPenalizerOrchestrator, batch: ScheduleBatch) -> None:
        self.vocab_size, self.device = theirs.vocab_size, theirs.device
        self.batch = batch
        self.is_required = theirs.is_required
        self.penalizers = {kind: self._own(penalizer) for kind, penalizer in theirs.penalizers.items()}

    def _own(self, penalizer: Any) -> Any:
        own = copy.copy(
            penalizer
        )  # shares what is counted so far until the batch is filtered: for one user at a time
        own._orchestrator_ref = weakref.ref(self)
        return own

    def cumulate_output_tokens(self, output_ids: torch.Tensor) -> None:
        """Called before a decode; `output_ids`, the last tokens that SGLang knows, count for bursts alone."""
        batch = self.batch
        if batch is None:
            raise RuntimeError("the batch of these penalties is gone")
        if not batch.spec_algorithm.is_none():  # of a burst SGLang feeds the last token alone
            return super().cumulate_output_tokens(output_ids)
        fed = [_token_fed(req, steps, batch) for req, steps in zip(batch.reqs, _steps(batch), strict=True)]
        tokens = torch.tensor(fed, dtype=torch.int64, pin_memory=is_pin_memory_available(self.device))
        return super().cumulate_output_tokens(tokens.to(self.device, non_blocking=True))


def own(batch: ScheduleBatch) -> None:
    """Give a batch that is about to decode penalties that count exactly, if any of its requests has one."""
    penalties = batch.sampling_info.penalizer_orchestrator if batch.sampling_info is not None else None
    if penalties is None or not penalties.is_required:
        return
    if not (isinstance(penalties, Penalties) and penalties.batch is batch):
        batch.sampling_info.penalizer_orchestrator = Penalties(penalties, batch)


def rebuild(batch: ScheduleBatch, count: int | None = None) -> None:
    """Feed what the first `count` requests (None: all) of a batch that was just built have written before.

    Theirs is the state of new requests so far. For a prefill, `batch` says where it ends; for those who are back
    from the host, how far they are computed.
    """
    penalties = batch.sampling_info.penalizer_orchestrator
    if not penalties.is_required:
        return
    for row, (req, steps) in enumerate(zip(batch.reqs[:count], _steps(batch), strict=False)):
        if steps <= 0 or not len(req.output_ids):
            continue
        fed = [_token_fed(req, step, batch) for step in range(steps)]
        tokens = torch.tensor(fed, dtype=torch.int64, device=penalties.device)
        for kind, penalizer in penalties.penalizers.items():
            if penalizer.is_prepared() and kind in REBUILT:
                REBUILT[kind](penalizer, row, tokens)


def _steps(batch: ScheduleBatch) -> list[int]:
    """How many decodes of each request come before this one, by the KV that it has; where a decode gives a burst, tokens."""
    if not batch.spec_algorithm.is_none():
        return [len(req.output_ids) for req in batch.reqs]
    return [
        tokens - len(req.origin_input_ids)
        for req, tokens in zip(batch.reqs, batch.seq_lens_cpu.tolist(), strict=True)
    ]


def _token_fed(req: Req, steps: int, batch: ScheduleBatch) -> int:
    """The token that SGLang feeds at a request's decode number `steps` (0: the one after its prefill)."""
    place = steps - 1 if batch.enable_overlap else steps
    if place < 0 or not len(req.output_ids):
        return int(req.origin_input_ids[-1])
    return int(req.output_ids[min(place, len(req.output_ids) - 1)])
