"""SGLang's scheduler as the other parts see it (`runtime.ports`): the one place that knows what it calls its members."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial

from sglang.srt.managers import scheduler as stock
from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ScheduleBatch

from sglang_slo.runtime.ports import KvPool, Running, UnbuiltError
from sglang_slo.runtime.requests import batches
from sglang_slo.runtime.scheduler.planned_adder import PlannedAdder
from sglang_slo.runtime.sglang import pools, tree


class EngineQueue:
    """`ports.Waiting` of a scheduler."""

    def __init__(self, scheduler: stock.Scheduler) -> None:
        self._scheduler = scheduler

    @property
    def reqs(self) -> list[Req]:
        """The queue itself."""
        return self._scheduler.waiting_queue

    @reqs.setter
    def reqs(self, reqs: list[Req]) -> None:
        self._scheduler.waiting_queue = reqs

    @property
    def cut(self) -> Req | None:
        """The half-prefilled request."""
        return self._scheduler.chunked_req

    @cut.setter
    def cut(self, req: Req | None) -> None:
        self._scheduler.chunked_req = req

    def grammars(self) -> bool:
        """Whether some wait for a grammar to be compiled."""
        return bool(self._scheduler.grammar_manager.has_waiting_grammars())

    def admit_ready_grammars(self) -> None:
        """Put those whose grammar is ready into the queue."""
        for req in self._scheduler.grammar_manager.get_ready_grammar_requests():
            self._scheduler._add_request_to_queue(req)

    def order(self, running: ScheduleBatch) -> None:
        """Bring the queue into SGLang's own order."""
        self._scheduler.policy.calc_priority(self._scheduler.waiting_queue, running)


class EngineBatches:
    """`ports.Batches` of a scheduler."""

    def __init__(self, scheduler: stock.Scheduler, pool: KvPool) -> None:
        self._scheduler, self._pool = scheduler, pool
        self.built: NextBatchPlan | None = None

    @property
    def iteration_number(self) -> int:
        """Iterations launched so far."""
        return int(self._scheduler.forward_ct)

    @property
    def chunk_tokens(self) -> int | None:
        """The longest chunk that SGLang's flags permit; None: no limit."""
        return self._scheduler.chunked_prefill_size

    @property
    def stock_ratio(self) -> float:
        """What share of the declared output SGLang's own admission reckons with at present."""
        return float(self._scheduler.new_token_ratio_tracker.current)

    def running(self) -> list[Req]:
        """Requests of SGLang's running batch."""
        return self._scheduler.running_batch.reqs

    def all(self) -> Iterable[ScheduleBatch | None]:
        """The running batch, the last one, and those whose results wait."""
        yield self._scheduler.running_batch
        yield self._scheduler.last_batch
        for batch, _ in getattr(self._scheduler, "result_queue", ()):
            yield batch

    def results_wait(self) -> bool:
        """Whether results of an iteration are still to be processed."""
        return bool(getattr(self._scheduler, "result_queue", ()))

    def decode_batch(self, reqs: list[Req]) -> ScheduleBatch:
        """A batch of requests whose KV is on the device up to their last token."""
        return batches.decode_batch(self._scheduler._build_hisparse_decode_batch, reqs)

    def request_slots(self, running: int) -> int:
        """Requests that may be added to `running` ones."""
        # the rows of those set aside can be had, if need be
        rows = int(self._scheduler.get_num_allocatable_reqs(running)) + len(self._pool.held)
        states = pools.state_room(self._scheduler)
        return rows if states is None else min(rows, states)

    def build_prefill(
        self, planned: dict[Req, int], loads: set[Req], mixed: bool, running: Running
    ) -> NextBatchPlan:
        """SGLang's own prefill batch of exactly the planned requests, and who goes on decoding: `built`.

        Where the places that the plan names are not theirs any more, that is everyone who ran.
        """
        self._scheduler.is_mixed_chunk = mixed
        with self._only(planned, loads):
            batch, part = self._scheduler._get_new_batch_prefill_raw(None, running.part)
            if running.rest is not None:  # those who decode are in the batch, or still where they were
                part = running.rest if batch is not None and part.is_empty() else running.whole
            self.built = NextBatchPlan(batch_to_run=batch, running_batch=part)
        return self.built

    @contextlib.contextmanager
    def _only(self, planned: dict[Req, int], loads: set[Req]) -> Iterator[None]:
        """While SGLang's prefill code runs: the queue is the plan, in its order, and nobody reorders it.

        If that code raises, those it had admitted give back their locks: they are in the queue as before. If it raises
        even later, where SGLang alone would end the server, those of the batch give back all they hold: UnbuiltError.
        """
        s = self._scheduler
        everyone, policy, adder, cut = s.waiting_queue, s.policy, stock.PrefillAdder, s.chunked_req
        if cut is None:  # one that was set aside goes on as if it had not been
            s.chunked_req = next((req for req in planned if req in self._pool.held), None)
        goes_on = s.chunked_req
        s.waiting_queue = offered = [r for r in planned if r is not goes_on]
        s.policy = _KeepOrder
        admitted: list[Req] = []
        stock.PrefillAdder = partial(
            PlannedAdder, planned=planned, loads=loads, admitted=admitted, held=self._pool.held
        )
        try:
            yield
        except Exception as error:
            if s.waiting_queue is not offered:  # they were taken out, for a batch that there will never be
                s.chunked_req = None if cut in planned else cut
                half_built = [*admitted, *([goes_on] if goes_on in planned else [])]
                self._released(half_built)
                raise UnbuiltError(half_built) from error
            s.chunked_req = cut
            for req in admitted:
                tree.unlock_of(s.tree_cache, req)
            tree.forget_offers(s.tree_cache, offered)
            raise
        finally:
            stock.PrefillAdder, s.policy = adder, policy
            left = set(s.waiting_queue)
            gone = {req for req in offered if req not in left}
            if goes_on is not None and s.waiting_queue is not offered:
                gone.add(goes_on)
            queue = [req for req in everyone if req not in gone] if gone else everyone
            # whatever SGLang's code put into the queue meanwhile (a grammar that became ready) stays in it
            queue.extend(req for req in s.waiting_queue if req not in planned)
            s.waiting_queue = queue

    def _released(self, half_built: list[Req]) -> None:
        s = self._scheduler
        for req in half_built:
            tree.release_half_built(s.tree_cache, s.req_to_token_pool, req)


class _KeepOrder:
    """In the place of SGLang's queue policy while a plan is applied."""

    @staticmethod
    def calc_priority(*args: object, **kwargs: object) -> bool:
        return False

    @staticmethod
    def shortest_prefill_chunk_limit(*args: object) -> None:
        return None
