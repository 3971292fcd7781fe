"""Output lengths on rank 0: features of requests as they arrive, predictions for the tick, learning at the end."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from sglang.srt.managers.io_struct import BatchTokenizedGenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req

from sglang_slo.config import SloConfig
from sglang_slo.core.length_gate import LengthGate
from sglang_slo.core.lengths import MAX_LENGTH_TOKENS, confidence_from_load
from sglang_slo.core.load import LoadMeter
from sglang_slo.core.slo import BEST_EFFORT
from sglang_slo.estimator.features import ArrivalFeatures
from sglang_slo.estimator.service import LengthService
from sglang_slo.estimator.stream import Vocabulary
from sglang_slo.server.limits import LimitError, slo_of

MOST_REVISED = 512  # live requests predicted anew at once: a few milliseconds
MOST_KNOWN = (
    1 << 16
)  # requests whose features wait for their end; an end that is never told costs no more than this


class ArrivingLengths:
    """Between SGLang's requests and the `LengthService`. Never raises: the service answers with its next level."""

    def __init__(self, service: LengthService, config: SloConfig) -> None:
        self.service, self._config = service, config
        self._low, self._high = config.confidence_low, config.confidence_high
        # requests in the queue or running: their features, and the log quantiles predicted at arrival
        self._known: dict[str, tuple[ArrivalFeatures, list[float]]] = {}
        self.gate = LengthGate()
        self._knowledge = service.knowledge
        self._load = LoadMeter()
        self._finished = 0

    def predict(self, received: list[Any]) -> dict[str, list[float]]:
        """Log quantiles of the output length, by request id, of the generation requests among `received`."""
        features = [features_of(r, self._config) for r in _generations(received)]
        if not features:
            return {}
        quantiles = self.service.predict(features).tolist()
        for f, q in zip(features, quantiles, strict=True):
            self._known[f.rid] = f, q
        while len(self._known) > MOST_KNOWN:
            del self._known[next(iter(self._known))]
        return {f.rid: q for f, q in zip(features, quantiles, strict=True)}

    def revised(self) -> dict[str, list[float]]:
        """Live requests predicted anew, the oldest first, when much more is known than at the last look; else empty."""
        knowledge, self._knowledge = self._knowledge, self.service.knowledge
        if self._knowledge == knowledge or not self._known:
            return {}
        features = [f for f, _ in itertools.islice(self._known.values(), MOST_REVISED)]
        quantiles = self.service.again(features).tolist()
        return {f.rid: q for f, q in zip(features, quantiles, strict=True)}

    def confidence(self, now_s: float, arrived: int, waiting: int) -> float:
        """Confidence of length bounds at the present load; also lets the service look after its training."""
        self.service.poll(now_s)
        finished, self._finished = self._finished, 0
        self._load.count(now_s, arrived, finished, waiting)
        return confidence_from_load(self._load.load(waiting), self._low, self._high)

    def for_log(self, rid: str) -> dict[str, Any]:
        """What the request log keeps of a live request's features; empty if they are not known."""
        known = self._known.get(rid)
        return known[0].for_log() if known is not None else {}

    def ended(self, req: Req) -> None:
        """A request is gone; one that came to its own end is learnt from."""
        known, reason = self._known.pop(req.rid, None), req.finished_reason
        if known is None or reason is None or isinstance(reason, FINISH_ABORT):
            return
        features, quantiles = known
        self._finished += 1
        tokens = delivered_tokens(req)
        self.gate.finished(np.array(quantiles), tokens)
        self.service.finished(features, tokens)


def delivered_tokens(req: Req) -> int:
    """Output tokens that the client is given so far: of a burst, those up to the one that ends the request."""
    ends, written = req.finished_len, len(req.output_ids)
    return written if ends is None else min(ends, written)


def _generations(received: list[Any]) -> Iterable[TokenizedGenerateReqInput]:
    for item in received:
        if isinstance(item, TokenizedGenerateReqInput):
            yield item
        elif isinstance(item, BatchTokenizedGenerateReqInput):
            yield from item


def features_of(request: TokenizedGenerateReqInput, config: SloConfig) -> ArrivalFeatures:
    """What is known of a request as it arrives. Its class is the one that it is judged and logged by."""
    params = request.sampling_params
    stop = params.stop_strs or ()
    text = request.input_text if isinstance(request.input_text, str) else None
    return ArrivalFeatures(
        declared_max=MAX_LENGTH_TOKENS if params.max_new_tokens is None else params.max_new_tokens,
        rid=request.rid,
        text=text,
        token_ids=None if text is not None else request.input_ids,
        prompt_tokens=len(request.input_ids) if request.input_ids is not None else None,
        slo_class=_class_of(params.custom_params, config),
        model=request.lora_id or "",
        caller=request.routing_key or request.extra_key or "",
        temperature=params.temperature,
        top_p=params.top_p,
        frequency_penalty=params.frequency_penalty,
        stop_strings=1 if isinstance(stop, str) else len(stop),
        min_new_tokens=params.min_new_tokens,
        ignore_eos=params.ignore_eos,
        constrained=any((params.json_schema, params.regex, params.ebnf, params.structural_tag)),
    )


def _class_of(custom_params: Any, config: SloConfig) -> str:
    try:
        return slo_of(custom_params, config).slo_class
    except LimitError:  # served as best effort
        return BEST_EFFORT.slo_class


def length_folder(config: SloConfig, model_path: str, dp_rank: int | None) -> Path:
    """Where a replica keeps what it has learnt of this model's lengths; one folder for each replica."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sglang-slo" / "lengths"
    name = hashlib.sha256(model_path.encode()).hexdigest()[:16]
    base = Path(config.model_dir).expanduser() if config.model_dir else cache / name
    folder = base / f"replica-{dp_rank or 0}"
    with contextlib.suppress(OSError):  # the service says what it cannot keep, and serves without
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def vocabulary_of(tokenizer: Any) -> Vocabulary | None:
    """How the tokenizer's ids are spelt, None without a tokenizer."""
    if tokenizer is None:
        return None
    try:
        return Vocabulary(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    except Exception:  # a tokenizer of another kind: ids are hashed instead
        return None
