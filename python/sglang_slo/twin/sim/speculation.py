"""Speculative decoding in virtual time: SGLang's own scheduling, KV and relays of it, around a worker that drafts nothing.

In the place of SGLang's worker of the algorithm named by `--speculative-algorithm` stands one that accepts tokens by lot:
each request has its own chance that a drafted token is accepted, and how many of a step are depends on the request and
on how far it has come alone. So a request writes the same bursts whenever it runs, and twice what was preempted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.managers import overlap_utils
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.mem_cache import allocation
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker

from sglang_slo.twin.devices.device import Pass
from sglang_slo.twin.sim.tokens import EOS_ID, TOKEN, hashed
from sglang_slo.twin.sim.worker import TwinWorker, pass_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    from sglang_slo.twin.workloads.workload import Workload


NO_DRAFT_MODEL = ("NGRAM",)  # its drafts are looked up


class Acceptance:
    """How many tokens each step of each request gives. `mean`: of the chance that a drafted token is accepted."""

    def __init__(self, workload: Workload) -> None:
        spread = hashed(np.array([1 << 32], np.uint64), len(workload), workload.seed)[0]
        mean = workload.acceptance
        # even on an interval around the mean, as wide as fits into [0, 1]
        self._chance = mean + (2 * _unit(spread) - 1) * min(mean, 1 - mean)
        self._seed = workload.seed

    def tokens(self, requests: NDArray[np.int64], lengths: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        """Tokens that a step gives requests [n] of these lengths, 1 to `most`: the accepted drafts and one."""
        keys = (requests.astype(np.uint64) << np.uint64(32)) + lengths.astype(np.uint64)
        lot = _unit(hashed(keys, 1, self._seed + 1)[:, 0])
        with np.errstate(divide="ignore", invalid="ignore"):
            drafts = np.floor(np.log(lot) / np.log(self._chance[requests]))  # geometric
        drafts = np.where(self._chance[requests] >= 1.0, most - 1, drafts)
        return 1 + np.clip(drafts, 0, most - 1).astype(np.int64)


def _unit(ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Hashed ids as numbers within (0, 1)."""
    return np.asarray((ids % (1 << 16) + 0.5) / (1 << 16))


class SpeculatingWorker(BaseSpecWorker):
    """SGLang's worker of a speculative algorithm, but for its models."""

    def __init__(self, target_worker: TwinWorker, **_: Any) -> None:
        super().__init__()
        self._target_worker, self._draft_worker = target_worker, None
        runner = target_worker.model_runner
        self._algorithm = runner.spec_algorithm
        self._most = int(overlap_utils.get_spec().speculative_num_draft_tokens)
        # passes of a draft model: one over what is prefilled; of a step one for each draft, and one over what was verified
        self._drafts = 0 if self._algorithm.name in NO_DRAFT_MODEL else 1
        self.acceptance = Acceptance(target_worker.recorder.workload)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._target_worker, name)

    def forward_batch_generation(
        self, batch: ScheduleBatch, on_publish: Any = None, **_: Any
    ) -> GenerationBatchResult:
        """A prefill or a mixed batch gives each request one token, a verification a burst of up to `most`."""
        if batch.forward_mode.is_extend():
            result = self._target_worker.launch(batch, pass_of(batch, self._drafts))
            result.new_seq_lens = batch.seq_lens
            tokens, given = result.next_token_ids[:, None], torch.ones(len(batch.reqs), dtype=torch.int64)
        else:
            result = self._verify(batch)
            tokens, given = result.next_token_ids.view(-1, self._most), result.accept_lens
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        result.next_draft_input = self._next(
            tokens, given, result.new_seq_lens, relayed=on_publish is not None
        )
        return result

    def _verify(self, batch: ScheduleBatch) -> GenerationBatchResult:
        """`batch.seq_lens`: tokens whose KV is there; the last token of each request is not among them."""
        recorder, most = self._target_worker.recorder, self._most
        contexts = batch.seq_lens_cpu.numpy() + 1
        requests = np.array([int(req.rid[1:]) for req in batch.reqs])
        given = self.acceptance.tokens(requests, contexts, most)
        load = Pass((), (contexts - 1 + most).tolist(), most, self._drafts * most)
        left = recorder.launched(batch, load, contexts.tolist(), given.tolist())
        tokens = torch.full((len(batch.reqs), most), TOKEN, dtype=torch.int64)
        for place, behind in left.items():
            tokens[place, behind] = EOS_ID
        accepted = torch.from_numpy(given)
        result = GenerationBatchResult(
            logits_output=None, next_token_ids=tokens.view(-1), accept_lens=accepted
        )
        result.speculative_num_draft_tokens = most
        result.new_seq_lens = batch.seq_lens + accepted
        result.end_s = recorder.engine.busy_until_s
        return result

    def _next(self, tokens: torch.Tensor, given: torch.Tensor, lengths: torch.Tensor, relayed: bool) -> Any:
        """What the next step drafts from, in SGLang's own form: `tokens` int64[n, up to most], `given` int64[n] of them.

        `relayed`: it goes by SGLang's buffers, which hold no more than they are given; else with the batch.
        """
        if self._algorithm.is_ngram():
            from sglang.srt.speculative.ngram_info import NgramVerifyInput

            padded = torch.zeros((len(tokens), self._most), dtype=torch.int64)
            padded[:, : tokens.shape[1]] = tokens
            return NgramVerifyInput(
                draft_token_num=self._most,
                new_seq_lens=lengths,
                accept_tokens=padded.flatten(),
                accept_lens=given,
            )
        from sglang.srt.speculative.eagle_info import EagleDraftInput

        bonus = tokens.gather(1, given[:, None] - 1)[:, 0]
        if relayed:
            return EagleDraftInput(bonus_tokens=bonus)
        drafted = torch.zeros((len(tokens), 1), dtype=torch.int64)
        return EagleDraftInput(bonus_tokens=bonus, topk_p=drafted.float(), topk_index=drafted)


def launch(scheduler: Any, batch: Any) -> Any:
    """`Scheduler.run_batch` of a speculating scheduler, without what serves a device."""
    future_map, rows = scheduler.future_map, batch.req_pool_indices
    overlap = scheduler.enable_overlap
    if overlap:
        future_map.resolve_seq_lens_cpu(batch)
    overlap_utils.resolve_forward_inputs(batch, future_map)
    with scheduler._forward_isolation(batch, overlap=False):
        publish = {"on_publish": lambda lengths: future_map.publish(rows, lengths)} if overlap else {}
        result = scheduler.model_worker.forward_batch_generation(batch, **publish)
        if overlap:
            scheduler._relay_forward_payload(batch, rows, result)
    batch.input_ids, batch.spec_info = None, result.next_draft_input
    if overlap:
        batch.spec_info.future_dsa_topk_indices_available = False
        batch.spec_info.future_indices = rows
    elif result.new_seq_lens is not batch.seq_lens:
        batch.seq_lens = result.new_seq_lens
        batch.seq_lens_cpu = result.new_seq_lens
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
    return result


def _assign(
    rows: torch.Tensor,
    table: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    slots: torch.Tensor,
    count: int,
) -> None:
    """`assign_req_to_token_pool_func` on plain torch: `slots` of each row behind those that it has."""
    taken = 0
    for row, first, last in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True):
        table[row, first:last] = slots[taken : taken + last - first].to(table.dtype)
        taken += last - first


class _Event:
    """An event of a device that is never behind."""

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def speculating() -> Iterator[None]:
    """While it is open, the twin's platform speculates, and overlaps it, as a GPU's does."""
    from sglang.srt.arg_groups import speculative_hook

    from sglang_slo.cpu.platform import NativeCpuPlatform as Platform

    with contextlib.ExitStack() as patches:

        def replace(owner: Any, name: str, by: Any) -> None:
            patches.enter_context(mock.patch.object(owner, name, by, create=True))

        if hasattr(speculative_hook, "_disable_overlap_schedule_for_cpu"):
            replace(speculative_hook, "_disable_overlap_schedule_for_cpu", lambda server_args: None)
        replace(Platform, "supports_speculative_algorithm", lambda self, algorithm: True)
        replace(Platform, "get_speculative_worker_cls", lambda self, algorithm: SpeculatingWorker)
        replace(allocation, "assign_req_to_token_pool_func", _assign)
        replace(MHATokenToKVPool, "_init_kv_copy_and_warmup", lambda pool: None)
        if not hasattr(torch.cpu, "Event"):
            replace(torch.cpu, "Event", _Event)
        yield
