"""Speculative decoding that computes for real, on the CPU: SGLang's own run of a batch, and a worker that drafts by lot.

A verification computes and writes as many tokens of each request as SGLang reserves slots for, one after the other, and
accepts the first of them, as many as a lot says. So KV, slots and tokens are those of speculative decoding with greedy
sampling; what is not is how a real worker finds its drafts, and that it computes them at once.
"""

from __future__ import annotations

import contextlib
import copy
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from sglang.srt.managers.overlap_utils import get_spec
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_slo.cpu.platform import NativeCpuPlatform
from sglang_slo.twin.sim.speculation import speculating

EAGLE = ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3", "--speculative-eagle-topk", "1"]
EAGLE += ["--speculative-num-draft-tokens", "4"]


class GreedyWorker(BaseSpecWorker):
    """In the place of SGLang's EAGLE worker."""

    def __init__(self, target_worker: Any, **_: Any) -> None:
        super().__init__()
        self._target_worker, self._draft_worker = target_worker, None
        self._most = int(get_spec().speculative_num_draft_tokens)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._target_worker, name)

    def forward_batch_generation(self, batch: Any, on_publish: Any = None, **_: Any) -> GenerationBatchResult:
        """See the module."""
        if batch.forward_mode.is_extend():
            result = self._target_worker.forward_batch_generation(batch)
            result.new_seq_lens, bonus = batch.seq_lens, result.next_token_ids
        else:
            result, bonus = self._verify(batch)
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        result.next_draft_input = EagleDraftInput(bonus_tokens=bonus)
        if on_publish is None:  # it travels with the batch
            drafted = torch.zeros((len(bonus), 1), dtype=torch.int64)
            result.next_draft_input.topk_p, result.next_draft_input.topk_index = drafted.float(), drafted
        return result

    def _verify(self, batch: Any) -> tuple[GenerationBatchResult, torch.Tensor]:
        lengths, rows = batch.seq_lens, batch.req_pool_indices
        lots = [
            zlib.crc32(f"{r.rid} {n}".encode()) % self._most + 1
            for r, n in zip(batch.reqs, lengths.tolist(), strict=True)
        ]
        given, last, tokens = torch.tensor(lots, dtype=torch.int64), batch.spec_info.bonus_tokens, []
        for step in range(self._most):
            one = copy.copy(batch)
            one.forward_mode, one.spec_algorithm, one.spec_info = (
                ForwardMode.DECODE,
                SpeculativeAlgorithm.NONE,
                None,
            )
            one.input_ids, one.seq_lens = last.to(torch.int64), lengths + 1 + step
            one.seq_lens_cpu, one.seq_lens_sum = one.seq_lens, int(one.seq_lens.sum())
            one.orig_seq_lens = one.seq_lens
            one.out_cache_loc = batch.req_to_token_pool.req_to_token[rows, lengths + step].to(torch.int64)
            out = self._target_worker.forward_batch_generation(one, is_verify=True)
            last = out.logits_output.next_token_logits.argmax(-1)
            tokens.append(last)
        table = torch.stack(tokens, 1)
        result = GenerationBatchResult(logits_output=None, next_token_ids=table.flatten(), accept_lens=given)
        result.speculative_num_draft_tokens, result.new_seq_lens = self._most, lengths + given
        return result, table.gather(1, given[:, None] - 1)[:, 0]


@contextlib.contextmanager
def for_real() -> Iterator[None]:
    """While it is open, `--speculative-algorithm EAGLE` runs `GreedyWorker` on this CPU."""
    with (
        speculating(),
        mock.patch.object(
            NativeCpuPlatform, "get_speculative_worker_cls", lambda self, algorithm: GreedyWorker
        ),
    ):
        yield
