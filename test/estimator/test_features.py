"""Rows are the same for training and serving, hold no text, and cost the same for any prompt length."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_slo.estimator.features import (
    DENSE_COLUMNS,
    EMPTY,
    HASH_BINS,
    ROW,
    ArrivalFeatures,
    encode,
    name_hash,
    rows_of,
)
from sglang_slo.estimator.stream import HEAD_CHARS, Vocabulary


def _column(name: str, **request) -> float:
    rows = encode([ArrivalFeatures(**{"declared_max": 100, **request})])
    return float(rows["dense"][0, DENSE_COLUMNS.index(name)])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_a_row_does_not_depend_on_the_batch_it_is_encoded_in(texts):
    together = encode([ArrivalFeatures(64, text=t) for t in texts])
    alone = [encode([ArrivalFeatures(64, text=t)]) for t in texts]
    assert [r.tobytes() for r in alone] == [together[i : i + 1].tobytes() for i in range(len(texts))]


def test_long_and_short_prompts_in_one_batch_keep_their_own_ends():
    long = "start " * 400 + "write an essay"
    mixed = encode([ArrivalFeatures(64, text=t) for t in ("hi there", long, "what is it?")])
    assert mixed[1:2].tobytes() == encode([ArrivalFeatures(64, text=long)]).tobytes()
    assert mixed[2:3].tobytes() == encode([ArrivalFeatures(64, text="what is it?")]).tobytes()


def test_a_request_keeps_neither_text_nor_ids_once_encoded():
    request = ArrivalFeatures(64, text="my secret is swordfish")
    encode([request])
    assert request.text is None and request.token_ids is None
    assert b"swordfish" not in pickle.dumps(request)
    assert rows_of([request]).dtype == ROW


def test_the_middle_of_a_very_long_prompt_is_not_read():
    ends = ("begin " * 400)[:HEAD_CHARS], "x " * 400
    rows = [
        encode([ArrivalFeatures(64, text=ends[0] + middle + ends[1])]) for middle in ("a" * 5000, "b" * 5000)
    ]
    assert rows[0]["grams"].tolist() == rows[1]["grams"].tolist()


def test_cues_of_length_are_found():
    assert _column("brief", text="Answer in a single short sentence") == 3
    assert _column("log_asked_units", text="Write 500 words on rain") == pytest.approx(np.log1p(500))
    assert _column("how much", text="How many bridges are there?") == 1
    assert _column("first line: code", text="Fix this:\npython code") == 0
    assert _column("code", text="Fix this:\npython code") == 2
    assert _column("last ?", text="Is it so?") == 1


def test_what_is_not_known_is_not_a_number():
    assert np.isnan(_column("log_tokens", token_ids=[1, 2, 3]))
    assert np.isnan(_column("caller_log_mean", text="hello"))
    assert _column("log_prompt_tokens", token_ids=[1, 2, 3]) == pytest.approx(np.log(4))


def test_ids_with_a_vocabulary_give_the_columns_of_the_text():
    vocabulary = Vocabulary(["Write", "\u0120an", "\u0120essay"])
    by_ids = encode([ArrivalFeatures(64, token_ids=[0, 1, 2], prompt_tokens=3)], vocabulary)
    by_text = encode([ArrivalFeatures(64, text="Write an essay", prompt_tokens=3)])
    assert by_ids["grams"].tolist() == by_text["grams"].tolist()
    assert by_ids["prompt"] == by_text["prompt"]


def test_ngrams_stay_in_their_bins_for_any_prompt():
    rows = encode([ArrivalFeatures(64, text=t) for t in ("", "word " * 3000, "\n\n", "\u4f60\u597d " * 50)])
    assert rows["grams"].max() <= EMPTY == HASH_BINS
    assert (rows["grams"][0] == EMPTY).all()


def test_names_hash_alike_in_every_process():
    command = "from sglang_slo.estimator.features import name_hash; print(name_hash('chat'))"
    out = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert int(out) == name_hash("chat")
    assert name_hash("chat") != name_hash("code")


def test_no_requests_give_no_rows():
    assert len(encode([])) == 0
