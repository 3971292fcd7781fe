"""Inputs that would end SGLang's scheduler or detokenizer for everyone: refused by name as they are tokenized.

A hook around `TokenizerManager._create_tokenized_object`, the one place where each item of a request, by text or by
token ids, has been tokenized and is not yet sent. Only what can be told from the request itself is refused here; what
depends on its neighbours in a batch is the scheduler's to plan around.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_slo.server import wire
from sglang_slo.server.errors import FieldError, shown
from sglang_slo.server.limits import Limited
from sglang_slo.server.visit import VISIT

MAX_PARALLEL = 4096  # `n`: SGLang makes a list of so many requests before it looks at any
INT32, INT64 = 2**31 - 1, 2**63 - 1
# (sampling parameter, least, most, bits): what SGLang makes tensors of without a look, for a whole batch at once
INTEGERS = (
    ("sampling_seed", -INT64, INT64, 64),
    ("stream_interval", 1, INT64, 64),
    ("top_k", -1, INT32, 32),
    ("min_new_tokens", 0, INT32, 32),
)
# Logits are divided by the penalty and by the temperature (1e-6 and more) in float32: what becomes infinite there ends
# the scheduler when it samples.
MIN_PENALTY, MAX_BIAS = 1e-6, 1e30


def checked(original: Callable[..., Any], manager: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """The tokenized request that SGLang makes of `obj`. Raises FieldError."""
    try:
        try:
            tokenized = original(manager, obj, *args, **kwargs)
        except (TypeError, OverflowError, AttributeError) as error:
            # a sampling parameter of a type that SGLang does arithmetic with unasked
            raise FieldError("sampling_params or input_ids", str(error)[:200]) from error
        vocabulary = manager.model_config.vocab_size
        _token_ids(obj, tokenized, vocabulary)
        _numbers(tokenized, vocabulary)
        wire.check(tokenized)
    except FieldError as error:
        visit = VISIT.get()
        if visit is not None:
            visit.refused = error
        raise
    if isinstance(obj.sampling_params, Limited):
        obj.sampling_params = obj.sampling_params.before
    return tokenized


def _token_ids(obj: Any, tokenized: Any, vocabulary: int) -> None:
    # A pass over no tokens at all ends the scheduler. The next turn of a session adds to what there is: `lifecycle`.
    made_later = (
        tokenized.mm_inputs,
        getattr(tokenized, "input_embeds", None),
        getattr(obj, "session_params", None),
    )
    if not tokenized.input_ids and all(source is None for source in made_later):
        raise FieldError("text or prompt", "need at least one token, got none")
    # Only ids that came as ids: of a prompt with images some are the processor's own, beyond the vocabulary.
    if obj.input_ids is None or tokenized.mm_inputs is not None or not tokenized.input_ids:
        return
    ids = np.frombuffer(tokenized.input_ids, np.int64)
    if ids.min() < 0 or ids.max() >= vocabulary:
        bad = int(ids[(ids < 0) | (ids >= vocabulary)][0])
        raise FieldError("input_ids", f"need token ids in [0, {vocabulary}), got {bad}")


def _numbers(tokenized: Any, vocabulary: int) -> None:
    params = tokenized.sampling_params
    if params.min_new_tokens and any(not 0 <= token < vocabulary for token in params.stop_token_ids or ()):
        raise FieldError("stop_token_ids", f"need token ids in [0, {vocabulary}) beside min_new_tokens")
    top = getattr(tokenized, "top_logprobs_num", None)
    if isinstance(top, int) and not 0 <= top <= vocabulary:
        raise FieldError("top_logprobs_num", f"need a number in [0, {vocabulary}], got {shown(top)}")
    start = getattr(tokenized, "logprob_start_len", None)
    if isinstance(start, int) and start < -1:
        raise FieldError("logprob_start_len", f"need -1 or more, got {shown(start)}")
    for name, low, high, bits in INTEGERS:
        value = getattr(params, name)
        if value is not None and isinstance(value, int) and not low <= value <= high:
            problem = f"need an integer of at least {low} in {bits} bits, got {shown(value)}"
            raise FieldError(f"sampling_params.{name}", problem)
    if isinstance(params.repetition_penalty, float) and params.repetition_penalty < MIN_PENALTY:
        shown_penalty = shown(params.repetition_penalty)
        raise FieldError(
            "repetition_penalty", f"need a number of at least {MIN_PENALTY:g}, got {shown_penalty}"
        )
    for token, bias in (params.logit_bias or {}).items():
        if isinstance(bias, int | float) and not abs(bias) <= MAX_BIAS:  # true for NaN as well
            raise FieldError(
                f"logit_bias.{shown(token)}", f"need a number up to {MAX_BIAS:g}, got {shown(bias)}"
            )


def parallel(obj: Any) -> None:
    """Raises FieldError for a number of samples `n` that SGLang would run out of memory with."""
    params = obj.sampling_params
    for row in params if isinstance(params, list) else [params]:
        n = row.get("n", 1) if isinstance(row, dict) else 1
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_PARALLEL):
            raise FieldError("n", f"need an integer from 1 to {MAX_PARALLEL}, got {shown(n)}")
