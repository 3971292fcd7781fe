"""Measures iterations on the real device before serving: dummy requests, real forward passes, nothing left.

A case is a batch: prefill chunks behind some history, and decodes with some context. Its history is KV that
is allocated but was never computed, so every shape costs one batch to set up. Passes run back to back with
one wait at the end of a round, as the overlap scheduler runs them, so that launching is hidden where it would
be while serving. Afterwards the pools are cleared, as SGLang's flush does: there is nothing else in them
before the first request. Forward passes are collective: every tensor-parallel rank runs the same cases in the
same order (`Pace` decides).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils import DynamicGradMode

from sglang_slo.core.latency import BatchShape, decode_shape
from sglang_slo.runtime.sglang import kv

Pace = Callable[
    [float], tuple[int, int] | None
]  # seconds of a first pass -> (rounds, passes in each), None: stop


@dataclass(frozen=True)
class Case:
    """One batch to measure. `chunks`: (history, new tokens) each; `decodes`: requests of `context` tokens."""

    chunks: tuple[tuple[int, int], ...] = ()
    decodes: int = 0
    context: int = 0

    @property
    def shape(self) -> BatchShape:
        """What the latency model will know of it."""
        base = decode_shape(self.decodes, self.decodes * self.context, beside_prefill=bool(self.chunks))
        for history, new in self.chunks:
            base = base.with_chunk(history, new)
        return base

    @property
    def kv_tokens(self) -> int:
        """KV it takes while it is measured."""
        return sum(h + n for h, n in self.chunks) + self.decodes * (self.context + 1)

    @property
    def requests(self) -> int:
        """How many they are."""
        return self.decodes + len(self.chunks)

    @property
    def longest(self) -> int:
        """Tokens of its longest request."""
        return max([h + n for h, n in self.chunks] + [self.context * bool(self.decodes)])


def cases(
    kv_tokens: int, slots: int, chunk_tokens: int, context_tokens: int, page_tokens: int = 1
) -> list[Case]:
    """Cases within this much KV, so many requests, and chunks and contexts of these sizes; small ones first.

    They cover what the model has to tell apart: decodes few and many, short and long; chunks with and without
    history; and chunks beside decodes.
    """
    decodes = [Case((), n, c) for n in (1, 4, 16, 64, 256) for c in (64, 1024, 8192, 32768)]
    chunks = [Case(((h, n),)) for n in (16, 64, 256, 1024, 2048, 4096, 8192) for h in (0, 2048, 16384)]
    mixed = [Case(((0, n),), d, c) for n in (64, 512) for d, c in ((16, 256), (64, 1024))]
    fitting = [
        case
        for case in decodes + chunks + mixed
        if case.kv_tokens + case.requests * (page_tokens - 1) <= kv_tokens
        and case.longest < context_tokens
        and case.requests <= slots
        and all(new <= chunk_tokens for _, new in case.chunks)
    ]
    return sorted(fitting, key=lambda case: (case.shape.new_tokens + case.kv_tokens / 16, case.kv_tokens))


class Bench:
    """Runs cases through the worker of a built scheduler that serves nobody yet."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._wait = scheduler.device_module.synchronize
        context = scheduler.model_config.context_len
        vocabulary = scheduler.model_config.vocab_size
        # the same tokens on every rank; varied, as experts are chosen by them
        self._tokens = array("q", np.random.default_rng(0).integers(1, vocabulary, context).tolist())

    def cases(self) -> list[Case]:
        """The cases that this scheduler has room for: in half of its KV."""
        s = self._scheduler
        allocator = s.token_to_kv_pool_allocator
        kv = allocator.available_size() // 2
        slots = min(s.req_to_token_pool.available_size(), s.max_running_requests)
        chunk = min(s.chunked_prefill_size or 8192, s.max_prefill_tokens)
        return cases(kv, slots, chunk, s.model_config.context_len, allocator.page_size)

    def run(self, todo: list[Case], pace: Pace) -> Iterator[tuple[BatchShape, float]]:
        """Shape and seconds of one pass for each case, until `pace` says stop."""
        for case in todo:
            seconds = self._measure(case, pace)
            if seconds is None:
                return
            yield case.shape, seconds

    @DynamicGradMode()
    def warm_up(self) -> None:
        """Let kernels compile and allocators grow, untimed: one prefill and one decode."""
        for case in (Case(((0, 64),)), Case((), 1, 64)):
            self._measure(case, lambda seconds: (0, 0))

    @DynamicGradMode()
    def _measure(self, case: Case, pace: Pace) -> float | None:
        try:
            batch = self._batch(case)
            first = self._round(batch, 1)  # may be slow: the first pass of a shape may compile kernels
            chosen = pace(first)
            if chosen is None:
                return None
            rounds, passes = chosen
            # The least of the rounds: what disturbs a round on a busy host only ever makes it longer.
            return min([self._round(batch, passes) for _ in range(rounds)], default=first)
        finally:
            self._wait()
            self._scheduler.token_to_kv_pool_allocator.clear()
            self._scheduler.req_to_token_pool.clear()

    def _round(self, batch: ScheduleBatch, passes: int) -> float:
        self._wait()
        began = time.perf_counter()
        for _ in range(passes):
            self._scheduler.tp_worker.forward_batch_generation(batch)
        self._wait()
        return (time.perf_counter() - began) / passes

    def _batch(self, case: Case) -> ScheduleBatch:
        s = self._scheduler
        sizes = [*case.chunks, *[(case.context - 1, 1)] * case.decodes]
        decode_only = not case.chunks
        if decode_only:  # set up one token short of it: preparing a decode adds the last one
            sizes = [(history - 1, new) for history, new in sizes]
        batch = ScheduleBatch.init_new(
            [self._request(f"measure-{i}", *size) for i, size in enumerate(sizes)],
            s.req_to_token_pool,
            s.token_to_kv_pool_allocator,
            s.tree_cache,
            s.model_config,
            False,
            s.spec_algorithm,
        )
        batch.prepare_for_extend()
        batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
        batch.prefill_input_ids_cpu = None
        if decode_only:
            batch.prepare_for_decode()
        return batch

    def _request(self, rid: str, history: int, new: int) -> Req:
        params = SamplingParams(temperature=0.0, max_new_tokens=8)
        params.normalize(None)
        req = Req(rid, "", self._tokens[: history + new], params, vocab_size=len(self._tokens))
        if history:
            kv.have_history(req, history, self._scheduler)
        req.full_untruncated_fill_ids = req.origin_input_ids
        req.logprob_start_len = -1
        kv.set_extend(req, new)
        return req
