"""What is known of a request at arrival, as numbers: the same code for training and for serving.

A row is `DENSE` float32 columns (NaN: not known) and up to `SLOTS` hashed n-grams (first part, last part and opening of
the prompt in ranges of their own). Rows hold no text and no token ids, so they may be kept. `VERSION` changes whenever
a column changes its meaning; a model made for another version is not used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from sglang_slo.estimator import prompt
from sglang_slo.estimator.stream import (
    HEAD_CHARS,
    HEAD_IDS,
    TAIL_CHARS,
    TAIL_TOKENS,
    Stream,
    Vocabulary,
    from_ids,
    from_texts,
    mix,
    pair,
    replace_docs,
    tail_of,
)

VERSION = 2
CHARS_PER_TOKEN = 4  # length in tokens of a text of n characters: n / 4

HEAD_GRAMS, OPENING_GRAMS = 160, 4  # tokens whose n-grams are hashed
SLOTS = 2 * HEAD_GRAMS + TAIL_TOKENS + OPENING_GRAMS
UNIGRAM_BINS, BIGRAM_BINS, TAIL_BINS, OPENING_BINS = 4096, 4096, 1024, 512
HASH_BINS = UNIGRAM_BINS + BIGRAM_BINS + TAIL_BINS + OPENING_BINS
EMPTY = HASH_BINS  # slot without an n-gram

REQUEST_COLUMNS = (
    *("log_prompt_tokens", "log_declared_max", "temperature", "top_p", "frequency_penalty", "stop_strings"),
    *("log_min_new_tokens", "ignore_eos", "constrained", "log_turns"),
    *(
        "caller_log_mean",
        "caller_log_last",
        "caller_log_count",
        "class_log_mean",
        "class_log_spread",
        "class_log_count",
    ),
)
DENSE_COLUMNS = (*REQUEST_COLUMNS, *prompt.COLUMNS)
DENSE = len(DENSE_COLUMNS)


@dataclass(slots=True)
class ArrivalFeatures:
    """A request as it arrives. Give `text` where there is one, else `token_ids`; both are dropped once encoded.

    `prompt_tokens` None: the number of ids, or characters / 4. `declared_max` tokens the client allows. `model` names
    the model or LoRA adapter, `caller` whoever sends requests that resemble each other; both may stay empty.
    """

    declared_max: int
    rid: str = ""  # the request's id; not a feature
    text: str | None = None
    token_ids: Sequence[int] | NDArray[np.int64] | None = None
    prompt_tokens: int | None = None
    slo_class: str = "default"
    model: str = ""
    caller: str = ""
    turns: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    stop_strings: int = 0
    min_new_tokens: int = 0
    ignore_eos: bool = False
    constrained: bool = False
    history: tuple[float, ...] = (
        np.nan,
    ) * 6  # filled by the service: lengths of this caller and class lately
    row: bytes | None = field(default=None, repr=False)  # encoded, one `ROW`
    raw: NDArray[np.floating] | None = field(default=None, repr=False)  # log quantiles before calibration [Q]
    issued: NDArray[np.floating] | None = field(default=None, repr=False)  # and after it
    source: int = field(default=-1, repr=False)  # which model said so

    def for_log(self) -> dict[str, str | int | float]:
        """What a request log keeps of a request besides its lengths; `estimator.data` reads it back."""
        kept = ("model", "caller", "declared_max", "turns", "temperature", "top_p")
        return {name: getattr(self, name) for name in kept}


Rows = NDArray[np.void]
"""Encoded requests: a structured array [n] of `ROW`."""

ROW = np.dtype(
    [
        ("dense", np.float32, (DENSE,)),
        ("grams", np.uint16, (SLOTS,)),  # EMPTY: none
        ("group", np.uint64),  # hash of the model's name
        ("slo_class", np.uint64),  # hash of the class's name
        ("prompt", np.uint64),  # fingerprint of the prompt's ends
    ]
)


def encode(requests: Sequence[ArrivalFeatures], vocabulary: Vocabulary | None = None) -> Rows:
    """Rows [n] of a batch. Texts and ids are dropped from the requests, their rows are kept in `.row`."""
    rows = np.zeros(len(requests), ROW)
    dense = np.full((len(requests), DENSE), np.nan, np.float32)
    rows["grams"] = EMPTY
    if requests:
        dense[:, : len(REQUEST_COLUMNS)] = _request_columns(requests)
    with_text = np.array([r.text is not None for r in requests], bool)
    for chosen in (np.flatnonzero(with_text), np.flatnonzero(~with_text)):
        if len(chosen):
            head, tail = _streams([requests[i] for i in chosen], vocabulary)
            if head.spelt:
                dense[chosen, len(REQUEST_COLUMNS) :] = prompt.columns(head, tail)
            rows["grams"][chosen] = _grams(head, tail)
            rows["prompt"][chosen] = _fingerprints(head, tail)
    rows["dense"] = dense
    rows["group"] = [name_hash(r.model) for r in requests]
    rows["slo_class"] = [name_hash(r.slo_class) for r in requests]
    data = rows.tobytes()
    for i, request in enumerate(requests):
        request.row = data[i * ROW.itemsize : (i + 1) * ROW.itemsize]
        request.text = request.token_ids = None
    return rows


def rows_of(requests: Sequence[ArrivalFeatures]) -> Rows:
    """Rows [n] of requests that have been encoded."""
    return np.frombuffer(b"".join(r.row or bytes(ROW.itemsize) for r in requests), ROW)


@lru_cache(maxsize=4096)
def name_hash(name: str) -> int:
    """64-bit hash of a name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


_READ = attrgetter(
    *("declared_max", "temperature", "top_p", "frequency_penalty", "stop_strings"),
    *("min_new_tokens", "ignore_eos", "constrained", "turns"),
)
_LOGGED = [i for i, name in enumerate(REQUEST_COLUMNS[:10]) if name.startswith("log_")]


def _request_columns(requests: Sequence[ArrivalFeatures]) -> NDArray[np.float32]:
    """`REQUEST_COLUMNS` [n, 16]; counts as log(1 + n)."""
    out = np.array([(_prompt_tokens(r), *_READ(r), *r.history) for r in requests], np.float32)
    out[:, _LOGGED] = np.log1p(np.maximum(out[:, _LOGGED], 0))
    return out


def _prompt_tokens(r: ArrivalFeatures) -> int:
    if r.prompt_tokens is not None:
        return r.prompt_tokens
    return len(r.token_ids) if r.token_ids is not None else len(r.text or "") // CHARS_PER_TOKEN


def _streams(requests: Sequence[ArrivalFeatures], vocabulary: Vocabulary | None) -> tuple[Stream, Stream]:
    """Head and tail of prompts that all have a text or all have none."""
    if requests[0].text is not None:
        texts = [r.text or "" for r in requests]
        head = from_texts([t[:HEAD_CHARS] for t in texts])
        tail, long = tail_of(head, TAIL_TOKENS), np.flatnonzero([len(t) > HEAD_CHARS for t in texts])
        if len(long):
            tail = replace_docs(
                tail, long, tail_of(from_texts([texts[i][-TAIL_CHARS:] for i in long]), TAIL_TOKENS)
            )
        return head, tail
    ids = [np.asarray(() if r.token_ids is None else r.token_ids[:HEAD_IDS], np.int64) for r in requests]
    ends = [np.asarray(() if r.token_ids is None else r.token_ids[-TAIL_TOKENS:], np.int64) for r in requests]
    return from_ids(ids, vocabulary), from_ids(ends, vocabulary)


def _grams(head: Stream, tail: Stream) -> NDArray[np.uint16]:
    """Hashed n-grams [n, SLOTS]: words and word pairs of the head, words of the tail, words of the opening."""
    out = np.full((head.n, SLOTS), EMPTY, np.uint16)
    place = head.place
    early = place < HEAD_GRAMS
    _put(out, head.doc[early], place[early], head.hashes[early], UNIGRAM_BINS, 0)
    both = np.flatnonzero((head.doc[1:] == head.doc[:-1]) & early[1:])
    pairs = pair(head.hashes[both], head.hashes[both + 1])
    _put(out, head.doc[both], HEAD_GRAMS + place[both], pairs, BIGRAM_BINS, UNIGRAM_BINS)
    opening = place < OPENING_GRAMS
    at = 2 * HEAD_GRAMS + place[opening]
    _put(out, head.doc[opening], at, head.hashes[opening], OPENING_BINS, UNIGRAM_BINS + BIGRAM_BINS)
    from_end = np.bincount(tail.doc, minlength=tail.n)[tail.doc] - 1 - tail.place
    late = from_end < TAIL_TOKENS
    at = 2 * HEAD_GRAMS + OPENING_GRAMS + from_end[late]
    _put(out, tail.doc[late], at, tail.hashes[late], TAIL_BINS, UNIGRAM_BINS + BIGRAM_BINS + OPENING_BINS)
    return out


def _put(
    out: NDArray[np.uint16],
    doc: NDArray[np.intp],
    slot: NDArray[np.intp],
    hashes: NDArray[np.uint64],
    bins: int,
    base: int,
) -> None:
    bin_of = (hashes & np.uint64(bins - 1)).astype(np.uint16)  # the numbers of bins are powers of two
    out.reshape(-1)[doc * SLOTS + slot] = bin_of + np.uint16(base)


def _fingerprints(head: Stream, tail: Stream) -> NDArray[np.uint64]:
    """One hash [n] of each prompt's two ends: tells repeated prompts."""
    total = np.zeros(head.n, np.uint64)
    for stream, salt in ((head, 3), (tail, 5)):
        np.add.at(
            total,
            stream.doc,
            mix(stream.hashes * (2 * stream.place.astype(np.uint64) + np.uint64(salt))),
        )
    return total
