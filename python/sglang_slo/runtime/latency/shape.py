"""The latency model's view of one of SGLang's batches, and of its launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_slo.core.latency import BatchShape, LatencyModel, decode_shape
from sglang_slo.runtime.requests.registry import Launch, RequestRegistry

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


def prefills(batch: ScheduleBatch) -> int:
    """How many requests of the batch, its first ones, are prefilling."""
    if not batch.forward_mode.is_extend():
        return 0
    return len(batch.reqs) - len(batch.decoding_reqs or ())


def token_getters(batch: ScheduleBatch) -> list[Req]:
    """The requests that get a token from this batch: all but the one whose prefill is cut."""
    if not batch.forward_mode.is_extend() or batch.chunked_req is None:
        return batch.reqs
    return [req for req in batch.reqs if req is not batch.chunked_req]


def batch_shape(batch: ScheduleBatch, verified: int = 1) -> BatchShape:
    """Tokens, query-context pairs and context of a batch that is ready to run; `verified`: tokens a decode alone computes.

    Under speculative decoding lengths come from the requests: the batch may know them only on the device.
    """
    first = prefills(batch)
    if batch.spec_algorithm.is_none():
        lengths = batch.seq_lens_cpu.tolist()
    else:
        lengths = [prefix + n for prefix, n in _pieces(batch, first)]
        lengths += [req.seqlen for req in batch.reqs[first:]]
    context = sum(lengths)
    if not batch.forward_mode.is_extend():
        return decode_shape(len(batch.reqs), context, verified=verified)
    new, pairs = 0, 0.0
    for n, length in zip(batch.extend_lens[:first], lengths[:first], strict=True):
        new += n
        pairs += n * (length - n + n / 2)
    return BatchShape(True, new + len(batch.reqs) - first, pairs, context, len(batch.reqs))


def _pieces(batch: ScheduleBatch, first: int) -> list[tuple[int, int]]:
    """(history, tokens) of the prefills of a batch, its `first` requests."""
    return list(zip(batch.prefix_lens[:first], batch.extend_lens[:first], strict=True)) if first else []


def _loaded_tokens(batch: ScheduleBatch) -> int:
    """Tokens whose KV is loaded from host memory for this batch; told once."""
    if not batch.forward_mode.is_extend():
        return 0
    tokens = 0
    for req in batch.reqs[: prefills(batch)]:
        tokens += getattr(req, "slo_load_tokens", 0)
        req.slo_load_tokens = 0
    return tokens


def note_launch(
    registry: RequestRegistry, batch: ScheduleBatch, iteration: int, now_s: float, model: LatencyModel
) -> None:
    """A batch was launched: its requests' next token is predicted at its end."""
    shape = batch_shape(batch, registry.table.step.verified_tokens)
    if (loaded := _loaded_tokens(batch)) > 0:
        shape = shape.loading(model.copy_s(loaded))
    predicted = model.iteration_s(shape)
    seen = registry.seen(token_getters(batch))
    rows, seqs = seen.rows, seen.seqs
    if not seen.whole:
        rows, seqs = rows[rows >= 0], seqs[rows >= 0]
    end_s = registry.ready_s(now_s) + predicted
    registry.launch(Launch(iteration, rows, seqs, shape, now_s, predicted, end_s))
