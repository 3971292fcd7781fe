"""Prompts as streams of hashed tokens, a whole batch at a time, without a Python loop over words.

A stream is made from text (words, single punctuation marks, line ends) or from token ids through a `Vocabulary` that
knows how each id is spelt; both give the same hashes, so a model trained on one serves the other. Only the first
`HEAD_CHARS` and the last `TAIL_CHARS` of a prompt are read: the cost of an arrival does not grow with its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEAD_CHARS, TAIL_CHARS = 1500, 300
TAIL_TOKENS = 48
HEAD_IDS = 320
UPPER, DIGIT, PUNCTUATION, NEWLINE, FOREIGN, NOUN, GERUND = 1, 2, 4, 8, 16, 32, 64  # flags of a token

_PRIME = np.uint64(1099511628211)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_LONGEST_WORD = 48  # bytes beyond it share their weight in the hash
_POWERS = np.ones(_LONGEST_WORD, np.uint64)
for _i in range(1, _LONGEST_WORD):
    _POWERS[_i] = (int(_POWERS[_i - 1]) * int(_PRIME)) & 0xFFFFFFFFFFFFFFFF
_SPACE, _WORD, _MARK = 0, 1, 2
_KIND = np.full(256, _MARK, np.uint8)
_KIND[[9, 11, 12, 13, 32]] = _SPACE
_KIND[[*range(48, 58), *range(65, 91), *range(97, 123), *range(128, 256)]] = _WORD
_LOWER = np.arange(256, dtype=np.uint8)
_LOWER[65:91] += 32
_LETTERS = np.where(_KIND == _SPACE, 0, _LOWER.astype(np.uint64) + np.uint64(1))


def _codes(*endings: str) -> NDArray[np.uint32]:
    return np.array([int.from_bytes(e.encode(), "big") for e in endings], np.uint32)


_NOUN4, _NOUN3 = _codes("tion", "ment", "ness", "ance", "ence", "logy"), _codes("ity", "ism", "ics")
_GERUND3, _LAST3 = _codes("ing"), np.uint32(0xFFFFFF)


@dataclass
class Stream:
    """Tokens of n documents one after the other. `doc` [T] ascending; `hashes` [T]; `flags` [T]; `value` [T]: a number
    token's value, else 0; `size` [T] bytes; `spelt`: False if the hashes are of bare ids."""

    n: int
    doc: NDArray[np.intp]
    hashes: NDArray[np.uint64]
    flags: NDArray[np.uint8]
    value: NDArray[np.float32]
    size: NDArray[np.int32]
    spelt: bool = True

    @cached_property
    def place(self) -> NDArray[np.intp]:
        """Place [T] of each token within its document."""
        first = np.searchsorted(self.doc, np.arange(self.n))
        return np.arange(len(self.doc)) - first[self.doc]


def mix(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread the entropy of 64-bit hashes over all bits."""
    h = (hashes ^ (hashes >> np.uint64(31))) * _MIX
    return np.asarray(h ^ (h >> np.uint64(29)), np.uint64)


def pair(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash of two neighbours in this order."""
    return mix(left * _PRIME + right)


def from_texts(texts: Sequence[str]) -> Stream:
    """Stream of a batch of texts."""
    coded = [text.encode("utf-8", "replace") for text in texts]
    raw = np.frombuffer(b"\0".join(coded) + b"\0", np.uint8).copy()
    ends = np.cumsum([len(c) + 1 for c in coded], dtype=np.intp) if coded else np.zeros(0, np.intp)
    raw[raw == 0] = 32
    raw[ends - 1] = 32
    kind = _KIND[raw]
    word = kind == _WORD
    begins = word.copy()
    begins[1:] &= ~word[:-1]
    starts = np.flatnonzero(begins | (kind == _MARK))
    if len(starts) == 0:
        return _empty(len(texts))
    doc = np.repeat(np.arange(len(texts)), np.diff(np.searchsorted(starts, ends), prepend=0))
    return _tokens(raw, kind, starts, doc, len(texts))


def _tokens(
    raw: NDArray[np.uint8], kind: NDArray[np.uint8], starts: NDArray[np.intp], doc: NDArray[np.intp], n: int
) -> Stream:
    """Tokens that begin at `starts`; a token runs to the next space or start. `raw` ends with a space."""
    word = kind == _WORD
    size = np.ones(len(starts), np.intp)  # a mark's
    edges = np.flatnonzero(word[1:] != word[:-1]) + 1  # where words begin and end, by turns
    if word[0]:
        edges = np.append(0, edges)
    size[word[starts]] = edges[1::2] - edges[::2]
    place = np.arange(len(raw))
    place -= np.repeat(np.append(0, starts), np.diff(starts, prepend=0, append=len(raw)))
    weighted = _POWERS[np.minimum(place, _LONGEST_WORD - 1, out=place)]
    weighted *= _LETTERS[raw]  # nothing for the spaces behind a token
    hashes = mix(np.add.reduceat(weighted, starts))
    value, digits = _numbers(raw, starts, size)
    head = raw[starts]
    flags = UPPER * ((head >= 65) & (head <= 90)) + DIGIT * digits + FOREIGN * (head >= 128)
    flags = flags + PUNCTUATION * ((kind[starts] == _MARK) & (head != 10)) + NEWLINE * (head == 10)
    flags = flags.astype(np.uint8) | _endings(raw, starts, size)
    return Stream(n, doc, hashes, flags, value, size.astype(np.int32))


def _endings(
    letters: NDArray[np.uint8], first: NDArray[np.intp], size: NDArray[np.intp]
) -> NDArray[np.uint8]:
    """GERUND or NOUN [T] where a word ends like one, behind at least two letters; a plural s is looked through."""
    flags = np.zeros(len(first), np.uint8)
    words = np.flatnonzero(size >= 5)
    end = first[words] + size[words] - 1
    end -= (_LOWER[letters[end]] == ord("s")) & (_LOWER[letters[end - 1]] != ord("c"))  # runs; not: physics
    last4 = np.zeros(len(words), np.uint32)
    for back in range(4):
        last4 |= _LOWER[letters[end - back]].astype(np.uint32) << np.uint32(8 * back)
    length = end - first[words] + 1
    noun = (_within(last4, _NOUN4) & (length >= 6)) | (_within(last4 & _LAST3, _NOUN3) & (length >= 5))
    flags[words] = NOUN * noun + GERUND * _within(last4 & _LAST3, _GERUND3) * (length >= 5)
    return flags


def _within(codes: NDArray[np.uint32], known: NDArray[np.uint32]) -> NDArray[np.bool_]:
    found: np.ndarray = np.logical_or.reduce(
        [codes == code for code in known]
    )  # a few: faster than any search
    return found


def _numbers(
    letters: NDArray[np.uint8], first: NDArray[np.intp], size: NDArray[np.intp]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Value [T] of the tokens that are numbers of up to five digits (0 for others), and which are digits only [T]."""
    value, digits = np.zeros(len(first), np.float32), np.zeros(len(first), bool)
    begin = letters[first]
    maybe = np.flatnonzero((begin >= 48) & (begin <= 57) & (size <= 5))
    sofar, fine = np.zeros(len(maybe), np.float32), np.ones(len(maybe), bool)
    for k in range(5):
        inside = size[maybe] > k
        letter = letters[np.minimum(first[maybe] + k, len(letters) - 1)]
        fine &= ~inside | ((letter >= 48) & (letter <= 57))
        sofar = np.where(inside, sofar * 10 + (letter - np.float32(48)), sofar)
    value[maybe[fine]], digits[maybe[fine]] = sofar[fine], True
    return value, digits


def tail_of(head: Stream, tokens: int) -> Stream:
    """The last `tokens` tokens of each document."""
    ends = np.searchsorted(head.doc, np.arange(head.n), side="right")
    keep = ends[head.doc] - np.arange(len(head.doc)) <= tokens if len(head.doc) else np.zeros(0, bool)
    return Stream(
        head.n,
        head.doc[keep],
        head.hashes[keep],
        head.flags[keep],
        head.value[keep],
        head.size[keep],
        head.spelt,
    )


def replace_docs(base: Stream, docs: NDArray[np.intp], new: Stream) -> Stream:
    """`base` with the documents `docs` [new.n] taken from `new` instead."""
    keep = ~np.isin(base.doc, docs)
    doc = np.concatenate([base.doc[keep], docs[new.doc]])
    order = np.argsort(doc, kind="stable")

    def joined(name: str) -> Any:
        return np.concatenate([getattr(base, name)[keep], getattr(new, name)])[order]

    return Stream(
        base.n, doc[order], joined("hashes"), joined("flags"), joined("value"), joined("size"), base.spelt
    )


class Vocabulary:
    """How token ids are spelt, as hashes: `pieces[i]` is the text of id i (a leading space or its stand-in is dropped)."""

    def __init__(self, pieces: Sequence[str]) -> None:
        plain = [p.lstrip(" \u0120\u2581").replace("\u010a", "\n")[:_LONGEST_WORD] for p in pieces]
        parts = from_texts(plain)
        first = np.searchsorted(parts.doc, np.arange(len(plain)))
        there = np.bincount(parts.doc, minlength=len(plain)) > 0
        at = np.minimum(first, max(0, len(parts.doc) - 1))
        ids = np.arange(len(plain), dtype=np.uint64)
        if len(parts.doc) == 0:
            parts, at = from_texts(["a"]), np.zeros(len(plain), np.intp)
        self.hashes = np.where(there, parts.hashes[at], mix(ids))
        self.flags = np.where(there, parts.flags[at], 0).astype(np.uint8)
        self.value = np.where(there, parts.value[at], 0).astype(np.float32)
        self.size = np.array([len(p) for p in plain], np.int32)


def from_ids(batch: Sequence[NDArray[np.int64]], vocabulary: Vocabulary | None) -> Stream:
    """Stream of a batch of id arrays; without a vocabulary the ids themselves are hashed and nothing is known of them."""
    doc = np.repeat(np.arange(len(batch)), [len(ids) for ids in batch])
    ids = np.concatenate(batch) if len(doc) else np.zeros(0, np.int64)
    if vocabulary is None or len(vocabulary.hashes) == 0:
        zero = np.zeros(len(ids), np.uint8)
        hashes = mix(ids.astype(np.uint64) + np.uint64(1 << 40))
        return Stream(
            len(batch), doc, hashes, zero, zero.astype(np.float32), zero.astype(np.int32), spelt=False
        )
    ids = np.clip(ids, 0, len(vocabulary.hashes) - 1)
    v = vocabulary
    return Stream(len(batch), doc, v.hashes[ids], v.flags[ids], v.value[ids], v.size[ids])


class HashSet:
    """A few hashes, looked up by 16 of their bits (those at which no two of them agree)."""

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self.keys = np.unique(hashes)
        shifts = (np.uint64(s) for s in range(49))
        self._shift = next(s for s in shifts if len(np.unique(self._slots(s))) == len(self.keys))
        self._table = np.zeros(1 << 16, np.int16)
        self._table[self._slots(self._shift)] = np.arange(len(self.keys))

    def find(self, hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
        """Index into `keys` of each hash (any, where it is not there), and which are there."""
        at = self._table[((hashes >> self._shift) & np.uint64(0xFFFF)).astype(np.intp)]
        return at, np.asarray(self.keys[at] == hashes)

    def has(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which hashes are in the set."""
        return self.find(hashes)[1]

    def _slots(self, shift: np.uint64) -> NDArray[np.uint64]:
        return (self.keys >> shift) & np.uint64(0xFFFF)


def _empty(n: int) -> Stream:
    z = np.zeros(0, np.uint8)
    return Stream(n, z.astype(np.intp), z.astype(np.uint64), z, z.astype(np.float32), z.astype(np.int32))
