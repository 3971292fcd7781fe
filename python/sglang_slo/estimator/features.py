"""What is known of a request at arrival, as numbers: the same code for training and for serving.

A row is `DENSE` float32 columns (NaN: not known) and up to `SLOTS` hashed n-grams (first part, last part and opening of
the prompt in ranges of their own). Rows hold no text and no token ids, so they may be kept. `VERSION` changes whenever
a column changes its meaning; a model made for another version is not used.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sglang_slo.estimator.lexicon import GROUPS, WORDS, Lexicon, count, hash_words
from sglang_slo.estimator.stream import (
    DIGIT,
    FOREIGN,
    GERUND,
    HEAD_CHARS,
    HEAD_IDS,
    NEWLINE,
    NOUN,
    PUNCTUATION,
    TAIL_CHARS,
    TAIL_TOKENS,
    UPPER,
    Stream,
    Vocabulary,
    from_ids,
    from_texts,
    mix,
    pair,
    replace_docs,
    tail_of,
)

VERSION = 1
CHARS_PER_TOKEN = 4  # length in tokens of a text of n characters: n / 4

OPENING = 5  # tokens
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
MARKS = "? \" : , . ( [ { < = * - # ' !"
STREAM_COLUMNS = (
    *(
        "log_tokens",
        "log_mean_size",
        "newlines",
        "upper_share",
        "digit_tokens",
        "foreign_share",
        "log_first_line",
    ),
    *("log_last_line", "log_largest_number", "log_asked_units", "log_sentence", "first_upper"),
    *("log_rest", "log_first_sentence", "log_quoted", "long_share", "distinct_share", "common_share"),
    *("log_abstract_nouns", "log_gerunds"),
    *(f"mark {m}" for m in MARKS.split()),
    *(f"last {m}" for m in ("?", ".", ":", '"', "other")),
)
LEXICON_COLUMNS = (
    *GROUPS,
    *(f"{segment}: {group}" for segment in ("first line", "opening") for group in WORDS),
)
DENSE_COLUMNS = (*REQUEST_COLUMNS, *STREAM_COLUMNS, *LEXICON_COLUMNS)
DENSE = len(DENSE_COLUMNS)

_LEXICON = Lexicon()
_MARKS = np.concatenate([hash_words(m) for m in MARKS.split()])
_LAST = _MARKS[[0, 4, 2, 1]]
_ENDS = np.sort(_MARKS[[0, 4, 2, -1]])
_COMMON = np.sort(hash_words("the a an of to in and"))
_DOC_BITS = np.uint64(0xFFFF)  # low bits that tell documents apart while counting distinct tokens
LONG_WORD = 8  # bytes
_UNITS = np.sort(
    hash_words(
        "word words sentence sentences paragraph paragraphs page pages line lines character characters"
    )
)


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
    for column, values in enumerate(zip(*(_request_columns(r) for r in requests), strict=True)):
        dense[:, column] = values
    with_text = np.array([r.text is not None for r in requests], bool)
    for chosen in (np.flatnonzero(with_text), np.flatnonzero(~with_text)):
        if len(chosen):
            head, tail = _streams([requests[i] for i in chosen], vocabulary)
            if head.spelt:
                dense[chosen, len(REQUEST_COLUMNS) :] = _stream_columns(head, tail)
            rows["grams"][chosen] = _grams(head, tail)
            rows["prompt"][chosen] = _fingerprints(head, tail)
    rows["dense"] = dense
    rows["group"] = [name_hash(r.model) for r in requests]
    rows["slo_class"] = [name_hash(r.slo_class) for r in requests]
    data = rows.tobytes()
    for i, request in enumerate(requests):
        request.row, request.text, request.token_ids = (
            data[i * ROW.itemsize : (i + 1) * ROW.itemsize],
            None,
            None,
        )
    return rows


def rows_of(requests: Sequence[ArrivalFeatures]) -> Rows:
    """Rows [n] of requests that have been encoded."""
    return np.frombuffer(b"".join(r.row or bytes(ROW.itemsize) for r in requests), ROW)


@lru_cache(maxsize=4096)
def name_hash(name: str) -> int:
    """64-bit hash of a name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _request_columns(r: ArrivalFeatures) -> tuple[float, ...]:
    if r.prompt_tokens is not None:
        prompt_tokens = r.prompt_tokens
    elif r.token_ids is not None:
        prompt_tokens = len(r.token_ids)
    else:
        prompt_tokens = len(r.text or "") // CHARS_PER_TOKEN
    return (
        *(math.log1p(max(0, prompt_tokens)), math.log1p(max(0, r.declared_max))),
        *(r.temperature, r.top_p, r.frequency_penalty, r.stop_strings),
        *(math.log1p(max(0, r.min_new_tokens)), r.ignore_eos, r.constrained, math.log1p(max(0, r.turns))),
        *r.history,
    )


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


def _stream_columns(head: Stream, tail: Stream) -> NDArray[np.float32]:
    """`STREAM_COLUMNS` and the lexicon's counts in each segment, [n, DENSE - len(REQUEST_COLUMNS)]."""
    place = _place(head)
    first_newline = np.where((head.flags & NEWLINE) > 0, place, len(place))
    cut = np.full(head.n, len(place) + 1)
    np.minimum.at(cut, head.doc, first_newline)
    hits, everything = _LEXICON.hits(head), np.ones(len(place), bool)
    counts = [
        count(hits, head, everything, len(GROUPS)),
        count(hits, head, place < cut[head.doc], len(WORDS)),
        count(hits, head, place < OPENING, len(WORDS)),
    ]
    return np.concatenate([_statistics(head, tail, place, cut), *counts], axis=1)


def _statistics(
    head: Stream, tail: Stream, place: NDArray[np.intp], cut: NDArray[np.intp]
) -> NDArray[np.float32]:
    """`STREAM_COLUMNS` [n, ...]: lengths, marks, numbers."""
    doc, n, flags = head.doc, head.n, head.flags

    def total(weights: NDArray[np.generic]) -> NDArray[np.float64]:
        return np.bincount(doc, weights.astype(np.float64), n)

    tokens = np.bincount(doc, minlength=n)
    some = np.maximum(tokens, 1)
    words = (flags & (PUNCTUATION | NEWLINE)) == 0
    largest = np.zeros(n)
    np.maximum.at(largest, doc, head.value)
    unit = _is_in(head.hashes[1:], _UNITS) & (doc[1:] == doc[:-1])
    asked = np.zeros(n)
    np.maximum.at(asked, doc[:-1][unit], head.value[:-1][unit])
    newlines = total((flags & NEWLINE) > 0)
    ends = total(_is_in(head.hashes, _ENDS))
    at = np.minimum(np.searchsorted(tail.doc, np.arange(tail.n), side="right") - 1, len(tail.doc) - 1)
    there = np.bincount(tail.doc, minlength=tail.n) > 0
    last = np.where(there, tail.hashes[at], 0) if len(tail.doc) else np.zeros(n, np.uint64)
    closing = last[:, None] == _LAST[None]
    last_line = tokens - _last_newline(head, place) - 1
    opens = total((place == 0) & ((flags & UPPER) > 0))
    columns = [
        *(
            np.log1p(tokens),
            np.log1p(total(head.size * words) / np.maximum(total(words), 1)),
            np.log1p(newlines),
        ),
        *(
            total((flags & UPPER) > 0) / some,
            np.log1p(total((flags & DIGIT) > 0)),
            total((flags & FOREIGN) > 0) / some,
        ),
        *(
            np.log1p(np.minimum(cut, tokens)),
            np.log1p(np.maximum(last_line, 0)),
            np.log1p(largest),
            np.log1p(asked),
        ),
        *(np.log1p(tokens / (1 + ends)), opens),
        *(np.log1p(np.maximum(tokens - cut, 0)), np.log1p(np.minimum(_first_end(head, place), tokens))),
        *(np.log1p(total(_quoted(head))), total(head.size >= LONG_WORD) / some, _distinct(head) / some),
        *(total(_is_in(head.hashes, _COMMON)) / some, np.log1p(total((flags & NOUN) > 0))),
        np.log1p(total((flags & GERUND) > 0)),
        *(np.log1p(total(head.hashes == mark)) for mark in _MARKS),
        *closing.T,
        ~closing.any(axis=1),
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def _first_end(head: Stream, place: NDArray[np.intp]) -> NDArray[np.intp]:
    """Place [n] of the first mark that ends a sentence, beyond the last token without one."""
    first = np.full(head.n, len(place) + 1)
    ends = _is_in(head.hashes, _ENDS)
    np.minimum.at(first, head.doc[ends], place[ends])
    return first


def _quoted(head: Stream) -> NDArray[np.bool_]:
    """Which tokens [T] stand between double quotes (an odd number of them came before in the prompt)."""
    quotes = head.hashes == _MARKS[1]
    before = np.cumsum(quotes)
    start = np.searchsorted(head.doc, np.arange(head.n))
    offset = np.append(0, before)[start]
    return np.asarray(((before - offset[head.doc]) % 2 == 1) & ~quotes)


def _distinct(head: Stream) -> NDArray[np.intp]:
    """Number of different tokens of each document [n]."""
    keys = np.unique((head.hashes & ~_DOC_BITS) | head.doc.astype(np.uint64))
    return np.bincount((keys & _DOC_BITS).astype(np.intp), minlength=head.n)[: head.n]


def _is_in(hashes: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which hashes [T] are in the sorted `known`."""
    return np.asarray(known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes)


def _last_newline(head: Stream, place: NDArray[np.intp]) -> NDArray[np.intp]:
    """Place [n] of the last line end of each document that more text follows, -1 without one."""
    last = np.full(head.n, -1)
    newline = (head.flags & NEWLINE) > 0
    newline[:-1] &= head.doc[1:] == head.doc[:-1]
    np.maximum.at(last, head.doc[newline], place[newline])
    return last


def _place(stream: Stream) -> NDArray[np.intp]:
    """Place [T] of each token within its document."""
    first = np.searchsorted(stream.doc, np.arange(stream.n))
    return np.arange(len(stream.doc)) - first[stream.doc] if len(stream.doc) else np.zeros(0, np.intp)


def _grams(head: Stream, tail: Stream) -> NDArray[np.uint16]:
    """Hashed n-grams [n, SLOTS]: words and word pairs of the head, words of the tail, words of the opening."""
    out = np.full((head.n, SLOTS), EMPTY, np.uint16)
    place = _place(head)
    early = place < HEAD_GRAMS
    _put(out, head.doc[early], place[early], head.hashes[early], UNIGRAM_BINS, 0)
    both = np.flatnonzero((head.doc[1:] == head.doc[:-1]) & early[1:])
    pairs = pair(head.hashes[both], head.hashes[both + 1])
    _put(out, head.doc[both], HEAD_GRAMS + place[both], pairs, BIGRAM_BINS, UNIGRAM_BINS)
    opening = place < OPENING_GRAMS
    at = 2 * HEAD_GRAMS + place[opening]
    _put(out, head.doc[opening], at, head.hashes[opening], OPENING_BINS, UNIGRAM_BINS + BIGRAM_BINS)
    from_end = np.bincount(tail.doc, minlength=tail.n)[tail.doc] - 1 - _place(tail)
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
    out[doc, slot] = base + (hashes % np.uint64(bins)).astype(np.intp)


def _fingerprints(head: Stream, tail: Stream) -> NDArray[np.uint64]:
    """One hash [n] of each prompt's two ends: tells repeated prompts."""
    total = np.zeros(head.n, np.uint64)
    for stream, salt in ((head, 3), (tail, 5)):
        np.add.at(
            total, stream.doc, mix(stream.hashes * (2 * _place(stream).astype(np.uint64) + np.uint64(salt)))
        )
    return total
