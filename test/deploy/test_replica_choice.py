"""Which replica a request goes to: limits first, then the prefix; no room is given away twice, nothing weighs for ever."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import status as told
from choice import BLOCK_CHARS, FORGET_S, MOST_BONUS, Ask, Choice, Room, Snapshot, prefix_blocks
from said import OUTPUT_TOKENS, read

ASK = Ask("a", prompt_tokens=1000, output_tokens=100, slo_class="chat")
TTFT_S = {"chat": 1.0}


def replica(tokens_per_s: float, kv_tokens: float = 1e6, **fields: Any) -> Snapshot:
    return Snapshot(room={"chat": Room(tokens_per_s, kv_tokens)}, ttft_s=TTFT_S, **fields)


def first(choice: Choice, ask: Ask, snapshots: dict[str, Snapshot], now_s: float = 0.0) -> str:
    best = choice.order(ask, snapshots, (), now_s)[0]
    choice.sent(ask, best, now_s)
    return best


def test_a_request_goes_where_its_limit_can_be_kept() -> None:
    assert first(Choice(), ASK, {"a": replica(900), "b": replica(1100)}) == "b"
    assert first(Choice(), ASK, {"a": replica(9000, kv_tokens=1000), "b": replica(1100)}) == "b"
    assert first(Choice(), replace(ASK, ttft_s=0.1), {"a": replica(9000), "b": replica(11000)}) == "b"


def test_two_arrivals_do_not_take_the_same_room() -> None:
    choice, both = Choice(), {"a": replica(2500), "b": replica(2400)}
    assert [first(choice, replace(ASK, id=str(i)), both) for i in range(3)] == ["a", "b", "a"]


def test_room_for_kv_is_not_taken_twice() -> None:
    choice, both = Choice(), {"a": replica(1e6, 2000), "b": replica(5e5, 2000)}
    assert [first(choice, replace(ASK, id=str(i)), both) for i in range(2)] == ["a", "b"]


def test_what_a_replica_tells_of_is_not_counted_again() -> None:
    choice, told_of = Choice(), {"a": replica(2500, seen=frozenset({"a"})), "b": replica(2400)}
    choice.sent(ASK, "a", 0.0)
    assert choice.place(ASK, "a", told_of["a"]).busy == 1
    assert first(choice, replace(ASK, id="next"), told_of) == "a"


def test_what_never_came_is_forgotten() -> None:
    choice, both = Choice(), {"a": replica(2500), "b": replica(2400)}
    choice.sent(ASK, "a", 0.0)
    assert choice.order(replace(ASK, id="b"), both, (), FORGET_S - 1)[0] == "b"
    assert choice.order(replace(ASK, id="b"), both, (), FORGET_S)[0] == "a"


def test_a_request_that_is_sent_again_counts_in_one_place() -> None:
    choice, both = Choice(), {"a": replica(2500), "b": replica(2400)}
    choice.sent(ASK, "a", 0.0)
    choice.sent(ASK, "b", 0.0)
    assert [choice.place(ASK, name, both[name]).busy for name in both] == [0, 1]


def test_where_no_limit_can_be_kept_the_least_work_stands_before_it() -> None:
    both = {"a": replica(0, waiting_tokens=5000), "b": replica(0, waiting_tokens=3000)}
    choice = Choice()
    assert [first(choice, replace(ASK, id=str(i)), both) for i in range(4)] == ["b", "b", "a", "b"]


def test_the_dead_and_the_tried_get_nothing() -> None:
    both = {"a": replica(1e5, alive=False), "b": replica(10)}
    assert Choice().order(ASK, both, (), 0.0) == ["b"]
    assert Choice().order(ASK, both, {"b"}, 0.0) == []


def asked(rid: str, prompt: str) -> Ask:
    return replace(ASK, id=rid, prompt_tokens=len(prompt), blocks=prefix_blocks(prompt))


def test_a_prefix_leads_to_the_replica_that_has_it_but_never_against_a_limit() -> None:
    prompt = "x" * 4 * BLOCK_CHARS
    choice, seen = Choice(), frozenset({"1"})
    choice.sent(asked("1", prompt), "b", 0.0)
    both = {"a": replica(3000, seen=seen), "b": replica(2000, seen=seen)}
    assert choice.order(asked("2", prompt), both, (), 0.0)[0] == "b"
    assert choice.order(asked("2", "y" + prompt), both, (), 0.0)[0] == "a"
    both["b"] = replica(1000, seen=seen)  # 1024 tokens in 1 s: too little, whatever is cached
    assert choice.order(asked("2", prompt), both, (), 0.0)[0] == "a"


def test_the_bonus_is_bounded_and_gone_with_the_replica() -> None:
    prompt, choice = "x" * 4 * BLOCK_CHARS, Choice()
    choice.sent(asked("1", prompt), "b", 0.0)
    assert choice.bonus_tokens(asked("2", prompt), "b") == MOST_BONUS * len(prompt)
    assert (
        choice.bonus_tokens(asked("2", prompt[: 2 * BLOCK_CHARS] + "z" * 2 * BLOCK_CHARS), "b")
        == len(prompt) / 2
    )
    choice.order(ASK, {"b": replica(1, alive=False)}, (), 0.0)
    assert choice.bonus_tokens(asked("2", prompt), "b") == 0


def test_the_beginnings_of_a_prompt_are_told_apart_by_all_that_stands_before() -> None:
    a, b = (
        prefix_blocks("a" * BLOCK_CHARS + "same" * BLOCK_CHARS),
        prefix_blocks("b" * BLOCK_CHARS + "same" * BLOCK_CHARS),
    )
    assert len(a) == len(b) == 5 and not set(a) & set(b)
    assert prefix_blocks("short") == ()
    assert prefix_blocks("a" * BLOCK_CHARS) == (0x78B03EFD0A5EA28B,)  # the same in every process


spare = st.builds(
    replica, st.floats(0, 1e5), st.floats(0, 1e5), waiting_tokens=st.floats(0, 1e5), alive=st.booleans()
)


@given(st.dictionaries(st.sampled_from("abcd"), spare), st.lists(st.integers(1, 5000), max_size=12))
def test_no_request_goes_where_it_breaks_its_limit_while_another_would_keep_it(
    snapshots: dict[str, Snapshot], prompts: list[int]
) -> None:
    choice = Choice()
    for i, tokens in enumerate(prompts):
        ask = replace(ASK, id=str(i), prompt_tokens=tokens)
        order = choice.order(ask, snapshots, (), 0.0)
        assert sorted(order) == sorted(name for name, s in snapshots.items() if s.alive)
        keeps = [choice.place(ask, name, snapshots[name]).keeps for name in order]
        assert keeps == sorted(keeps, reverse=True)
        if order:
            choice.sent(ask, order[0], 0.0)


def test_a_status_becomes_a_snapshot_and_its_replicas_add_up() -> None:
    now = {
        "running": 2,
        "backlog_tokens": 300,
        "headroom": {
            "chat": {"tokens_per_s": 10.0, "kv_tokens": 5},
            "default": {"tokens_per_s": None, "kv_tokens": 1},
        },
    }
    status = {
        "classes": {"chat": {"ttft_ms": 500}, "batch": {}},
        "replicas": [{"now": now}, {"now": now}, {"now": None}],
    }
    found = told.snapshot(json.loads(json.dumps(told.plain(status, ["r"]))))
    assert found.room == {"chat": Room(20.0, 10), "default": Room(0.0, 2)}
    assert (found.running, found.waiting_tokens, found.ttft_s, found.seen) == (4, 600, {"chat": 0.5}, {"r"})
    assert not told.snapshot(told.GONE).alive
    assert told.snapshot(None).room["default"] == Room(math.inf, math.inf)
    assert told.snapshot(told.plain({"policy": "stock"}, [])).room == {}


WAYS: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({}, {"slo": {"class": "chat", "ttft_ms": 500}}),
    ({}, {"sampling_params": {"custom_params": {"slo": {"class": "chat", "ttft_ms": 500}}}}),
    ({}, {"custom_params": {"slo": {"class": "chat", "ttft_ms": 500}}}),
    ({}, {"metadata": {"slo_class": "chat", "slo_ttft_ms": "500"}}),
    ({}, {"custom_labels": {"slo_class": "chat", "slo_ttft_ms": "500"}}),
    ({"X-SLO-Class": "chat", "x-slo-ttft-ms": "500"}, {}),
    ({"x-sgl-slo-class": "chat", "x-sgl-slo-ttft-s": "0.5"}, {}),
    ({"x-llm-d-slo-class": "chat", "x-llm-d-slo-ttft-us": "500ms"}, {}),
    ({"tracestate": "other=1,slo=class:chat;ttft:500"}, {}),
    ({"x-llm-d-inference-objective": "chat", "x-slo-ttft-ms": "500"}, {}),
]


@pytest.mark.parametrize(("headers", "body"), WAYS)
def test_limits_are_read_by_every_way_that_needs_no_settings(
    headers: dict[str, str], body: dict[str, Any]
) -> None:
    found = read("r", headers, json.dumps({"text": "x" * 80, "max_tokens": 7, **body}).encode(), 4.0)
    assert (found.slo_class, found.ttft_s, found.prompt_tokens, found.output_tokens) == ("chat", 0.5, 21, 7)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"[1]",
        b'{"slo": 3, "metadata": 4, "sampling_params": [], "custom_params": "x"}',
        b"\xff\xfe",
    ],
)
def test_what_cannot_be_read_counts_as_not_said(body: bytes) -> None:
    found = read("r", {"x-slo-ttft-ms": "soon", "tracestate": "slo=;;"}, body, 4.0)
    assert (found.slo_class, found.ttft_s, found.output_tokens) == ("default", None, OUTPUT_TOKENS)


def test_the_strongest_place_says_each_field() -> None:
    body = json.dumps(
        {"input_ids": [1, 2, 3], "slo": {"ttft_ms": 100}, "metadata": {"slo_class": "chat"}}
    ).encode()
    found = read("r", {"x-slo-class": "batch", "x-slo-ttft-ms": "9"}, body, 4.0)
    assert (found.slo_class, found.ttft_s, found.prompt_tokens) == ("chat", 0.1, 3)
