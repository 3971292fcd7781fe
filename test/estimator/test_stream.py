"""Text and token ids become the same streams, and no prompt leaks into its neighbour's."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_slo.estimator import stream
from sglang_slo.estimator.stream import Vocabulary, from_ids, from_texts

texts = st.lists(st.text(max_size=40), min_size=1, max_size=6)


@settings(deadline=None)
@given(texts)
def test_a_prompt_reads_the_same_alone_and_in_a_batch(batch):
    together = from_texts(batch)
    for i, text in enumerate(batch):
        alone = from_texts([text])
        assert together.hashes[together.doc == i].tolist() == alone.hashes.tolist()
        assert together.flags[together.doc == i].tolist() == alone.flags.tolist()
        assert together.value[together.doc == i].tolist() == alone.value.tolist()


def test_ids_with_a_vocabulary_read_like_the_text_they_spell():
    vocabulary = Vocabulary(["\u0120write", "\u0120500", "\u0120Words", ".", "\u2581about", "\u010a"])
    ids = from_ids([np.array([0, 1, 2, 4, 3, 5])], vocabulary)
    text = from_texts(["write 500 Words about.\n"])
    assert ids.hashes.tolist() == text.hashes.tolist()
    assert ids.flags.tolist() == text.flags.tolist()
    assert ids.value.tolist() == text.value.tolist()


def test_words_are_told_apart_by_letters_and_order_but_not_by_case():
    hashes = from_texts(["stop pots STOP tops opts"]).hashes
    assert len(set(hashes.tolist())) == 4
    assert hashes[0] == hashes[2]


def test_numbers_have_their_value_and_words_with_digits_have_none():
    s = from_texts(["7 365 99999 123456 4th v2"])
    assert s.value.tolist() == [7, 365, 99999, 0, 0, 0]


def test_endings_tell_abstract_nouns_and_gerunds():
    s = from_texts(["relationships walking nation sing king city cities government s"])
    nouns = [bool(f & stream.NOUN) for f in s.flags]
    gerunds = [bool(f & stream.GERUND) for f in s.flags]
    assert nouns == [False, False, True, False, False, False, False, True, False]
    assert gerunds == [False, True, False, False, False, False, False, False, False]


def test_ids_outside_the_vocabulary_and_no_ids_at_all_are_taken():
    vocabulary = Vocabulary(["a", "b"])
    assert len(from_ids([np.array([0, 5, 10**9])], vocabulary).hashes) == 3
    assert from_ids([np.zeros(0, np.int64)], vocabulary).n == 1
    assert from_texts([]).n == 0


def test_the_last_tokens_of_each_prompt_are_its_own():
    head = from_texts(["a b c d", "", "e f"])
    tail = stream.tail_of(head, 2)
    assert tail.doc.tolist() == [0, 0, 2, 2]
    assert tail.hashes.tolist() == from_texts(["c d e f"]).hashes.tolist()
