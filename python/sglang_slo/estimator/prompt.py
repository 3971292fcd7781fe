"""Columns that describe a prompt's text: lengths of its parts, marks, numbers, kinds of words, the lexicon's groups.

From the streams of a batch, without a loop over prompts. Counts enter as log(1 + n), shares as shares.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sglang_slo.estimator.lexicon import GROUPS, WORDS, Lexicon, count, hash_words
from sglang_slo.estimator.stream import (
    DIGIT,
    FOREIGN,
    GERUND,
    NEWLINE,
    NOUN,
    PUNCTUATION,
    UPPER,
    HashSet,
    Stream,
)

OPENING = 5  # tokens
LONG_WORD = 8  # bytes
MARKS = ["?", '"', ":", ",", ".", "(", "[", "{", "<", "=", "*", "-", "#", "'", "!"]
SENTENCE_MARKS, CLOSING_MARKS = "?.:!", '?.:"'
LENGTH_UNITS = "word words sentence sentences paragraph paragraphs page pages line lines character characters"
STATISTICS = (
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
    *(f"mark {m}" for m in MARKS),
    *(f"last {m}" for m in (*CLOSING_MARKS, "other")),
)
LEXICON_COLUMNS = (
    *GROUPS,
    *(f"{segment}: {group}" for segment in ("first line", "opening") for group in WORDS),
)
COLUMNS = (*STATISTICS, *LEXICON_COLUMNS)

_LEXICON = Lexicon()
_MARKS = np.concatenate([hash_words(m) for m in MARKS])
_MARK_ORDER = np.argsort(_MARKS)
_SORTED_MARKS = _MARKS[_MARK_ORDER]
_SENTENCE = np.array([MARKS.index(m) for m in SENTENCE_MARKS])
_CLOSING = _MARKS[[MARKS.index(m) for m in CLOSING_MARKS]]
_UNITS, _COMMON = HashSet(hash_words(LENGTH_UNITS)), HashSet(hash_words("the a an of to in and"))
_KEY_BITS = np.uint64(0xFFFF)

Floats = NDArray[np.floating]
Places = NDArray[np.intp]


def columns(head: Stream, tail: Stream) -> NDArray[np.float32]:
    """`COLUMNS` of each prompt, float32 [n, len(COLUMNS)]."""
    at = head.place
    newline = np.flatnonzero(head.flags & NEWLINE)
    cut = _first(head, newline, at)
    hits = _LEXICON.hits(head)
    counts = [
        count(hits, head, np.ones(len(at), bool), len(GROUPS)),
        count(hits, head, at < cut[head.doc], len(WORDS)),
        count(hits, head, at < OPENING, len(WORDS)),
    ]
    parts = [_sums(head, at), _lengths(head, at, newline, cut), _marks(head, at), _closing(tail)]
    by_name = {name: column for part in parts for name, column in part.items()}
    statistics = np.stack([by_name[name] for name in STATISTICS], axis=1).astype(np.float32)
    return np.concatenate([statistics, *counts], axis=1)


def _sums(head: Stream, at: Places) -> dict[str, Floats]:
    """Columns that are sums over a prompt's tokens."""
    quotes = head.hashes == _MARKS[MARKS.index('"')]
    before = np.cumsum(quotes, dtype=np.int32)
    first = np.searchsorted(head.doc, np.arange(head.n))
    offset = np.append(np.int32(0), before)[first]
    quoted = ((before - offset[head.doc]) & 1).astype(bool) & ~quotes  # an odd number of quotes came before
    tokens = np.bincount(head.doc, minlength=head.n)
    some = np.maximum(tokens, 1)
    newlines, punctuation, upper, digits = _totals(head, _MARK_FIELDS[head.flags])
    foreign, nouns, gerunds, _ = _totals(head, _KIND_FIELDS[head.flags])
    size = np.where(head.flags & (PUNCTUATION | NEWLINE), 0, head.size)
    words = tokens - punctuation - newlines
    quoted_n, long, common, letters = _totals(
        head, _fields(quoted, head.size >= LONG_WORD, _COMMON.has(head.hashes), size)
    )
    opens = np.zeros(head.n)
    there = np.flatnonzero(tokens)
    opens[there] = (head.flags[first[there]] & UPPER) > 0
    return {
        "log_tokens": np.log1p(tokens),
        "log_mean_size": np.log1p(letters / np.maximum(words, 1)),
        "newlines": np.log1p(newlines),
        "upper_share": upper / some,
        "digit_tokens": np.log1p(digits),
        "foreign_share": foreign / some,
        "log_abstract_nouns": np.log1p(nouns),
        "log_gerunds": np.log1p(gerunds),
        "log_quoted": np.log1p(quoted_n),
        "long_share": long / some,
        "common_share": common / some,
        "first_upper": opens,
        "distinct_share": _distinct(head) / some,
    }


def _lengths(head: Stream, at: Places, newline: Places, cut: Places) -> dict[str, Floats]:
    """Lengths of lines, the largest number, and the number before words, sentences, pages."""
    tokens = np.bincount(head.doc, minlength=head.n)
    inner = newline[newline + 1 < len(head.doc)]
    inner = inner[head.doc[inner] == head.doc[inner + 1]]
    last = np.full(head.n, -1)
    np.maximum.at(last, head.doc[inner], at[inner])
    numbers = np.flatnonzero(head.value > 0)
    largest, asked = np.zeros(head.n), np.zeros(head.n)
    np.maximum.at(largest, head.doc[numbers], head.value[numbers])
    before = numbers[numbers + 1 < len(head.doc)]
    before = before[_UNITS.has(head.hashes[before + 1]) & (head.doc[before] == head.doc[before + 1])]
    np.maximum.at(asked, head.doc[before], head.value[before])
    return {
        "log_first_line": np.log1p(np.minimum(cut, tokens)),
        "log_rest": np.log1p(np.maximum(tokens - cut, 0)),
        "log_last_line": np.log1p(tokens - last - 1),
        "log_largest_number": np.log1p(largest),
        "log_asked_units": np.log1p(asked),
    }


def _marks(head: Stream, at: Places) -> dict[str, Floats]:
    """Counts of marks, and what follows from where sentences end."""
    tokens = np.bincount(head.doc, minlength=head.n)
    marks = np.flatnonzero(head.flags & PUNCTUATION)
    slot = np.minimum(np.searchsorted(_SORTED_MARKS, head.hashes[marks]), len(_MARKS) - 1)
    known = _SORTED_MARKS[slot] == head.hashes[marks]
    marks, which = marks[known], _MARK_ORDER[slot[known]]
    flat = head.doc[marks] * len(_MARKS) + which
    counts = np.bincount(flat, minlength=head.n * len(_MARKS)).reshape(head.n, len(_MARKS))
    ends = _first(head, marks[np.isin(which, _SENTENCE)], at)
    logs = np.log1p(counts)
    return {
        "log_sentence": np.log1p(tokens / (1 + counts[:, _SENTENCE].sum(axis=1))),
        "log_first_sentence": np.log1p(np.minimum(ends, tokens)),
        **{f"mark {mark}": logs[:, i] for i, mark in enumerate(MARKS)},
    }


def _closing(tail: Stream) -> dict[str, Floats]:
    """Which mark the prompt ends with."""
    end = np.searchsorted(tail.doc, np.arange(tail.n), side="right")
    there = end > np.searchsorted(tail.doc, np.arange(tail.n))
    last = np.zeros(tail.n, np.uint64)
    last[there] = tail.hashes[end[there] - 1]
    is_last = last[:, None] == _CLOSING
    named = {f"last {mark}": is_last[:, i].astype(float) for i, mark in enumerate(CLOSING_MARKS)}
    return {**named, "last other": (~is_last.any(axis=1)).astype(float)}


def _fields(*counts: NDArray[np.generic]) -> NDArray[np.uint64]:
    """Four counts of a token in one number, 16 bits each: a prompt's sums stay below 2^16 (its ends are cut)."""
    out = counts[0].astype(np.uint64)
    for i, more in enumerate(counts[1:], 1):
        out |= more.astype(np.uint64) << np.uint64(16 * i)
    return out


# for each value of a token's flags, which of four it has
_FLAGS = np.arange(256)
_MARK_FIELDS = _fields(*(_FLAGS & f > 0 for f in (NEWLINE, PUNCTUATION, UPPER, DIGIT)))
_KIND_FIELDS = _fields(*(_FLAGS & f > 0 for f in (FOREIGN, NOUN, GERUND)))


def _totals(head: Stream, fields: NDArray[np.uint64]) -> list[Floats]:
    """Sums of each of the four counts of `fields` [T] over each prompt, 4 x float64 [n]."""
    sums = np.zeros(head.n, np.uint64)
    if len(fields):
        first = np.flatnonzero(np.append(True, head.doc[1:] != head.doc[:-1]))
        sums[head.doc[first]] = np.add.reduceat(fields, first)
    return [((sums >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.float64) for i in range(4)]


def _first(head: Stream, tokens: Places, at: Places) -> Places:
    """Place [n] of each prompt's first of the given tokens (ascending), beyond its last token without one."""
    out = np.full(head.n, len(at) + 1)
    docs = head.doc[tokens]
    out[docs[::-1]] = at[tokens][::-1]  # the first one is written last
    return out


def _distinct(head: Stream) -> NDArray[np.intp]:
    """Number of tokens [n] of each prompt that differ in 16 bits of their hashes: one in 400 hides behind another."""
    keys = np.sort((head.hashes & _KEY_BITS).astype(np.uint32) << np.uint32(16) | head.doc.astype(np.uint32))
    fresh = keys[np.append(True, keys[1:] != keys[:-1])] if len(keys) else keys
    return np.bincount(fresh & np.uint32(_KEY_BITS), minlength=head.n)[: head.n]
