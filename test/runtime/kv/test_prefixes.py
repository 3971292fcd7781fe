"""A prefix that is cached while somebody waits is noticed; only those who share a beginning are looked at."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import invariants
import real_scheduler as real
from sglang_slo.runtime.kv.prefixes import LOOK_UPS, SHARED_TOKENS, PrefixGroups
from sglang_slo.runtime.sglang import kv, tree


def _request(rid: str, *start: int, tail: int = 100) -> Any:
    ids = array("q", [*start, *range(1000, 1000 + SHARED_TOKENS + tail)])
    return SimpleNamespace(rid=rid, origin_input_ids=ids, extra_key=None, lora_id=None)


def test_those_that_begin_alike_are_looked_up_again_once_one_was_computed() -> None:
    groups = PrefixGroups()
    first, same, other = _request("a", 1), _request("b", 1), _request("c", 2)
    numbers = [groups.opened(req) for req in (first, same, other)]
    assert numbers[0] == numbers[1] != numbers[2]
    groups.computed([(first, numbers[0])], lambda req: True)
    assert groups.stale() == [same]
    assert groups.stale() == []


def test_a_prompt_too_short_to_share_belongs_to_no_group() -> None:
    short = SimpleNamespace(rid="s", origin_input_ids=array("q", range(SHARED_TOKENS)))
    assert PrefixGroups().opened(short) == 0


def test_other_adapters_and_other_salts_share_nothing() -> None:
    groups = PrefixGroups()
    salted, adapted = _request("b", 1), _request("c", 1)
    salted.extra_key, adapted.lora_id = "salt", "adapter"
    assert len({groups.opened(req) for req in (_request("a", 1), salted, adapted)}) == 3


def test_what_runs_or_has_ended_is_not_looked_up() -> None:
    groups = PrefixGroups()
    reqs = [_request(f"r{i}", 1) for i in range(4)]
    (number,) = {groups.opened(req) for req in reqs}
    groups.computed([(reqs[0], number)], lambda req: req.rid != "r1")
    groups.closed("r2", number)
    assert groups.stale() == [reqs[3]]
    for rid in ("r0", "r1", "r3"):
        groups.closed(rid, number)
    assert len(groups) == 0


def test_a_crowd_is_looked_up_a_few_at_a_time_and_nobody_is_forgotten() -> None:
    groups = PrefixGroups()
    reqs = [_request(f"r{i}", 1) for i in range(2 * LOOK_UPS + 3)]
    (number,) = {groups.opened(req) for req in reqs}
    groups.computed([(reqs[0], number)], lambda req: True)
    looked = [groups.stale() for _ in range(4)]
    assert [len(found) for found in looked] == [LOOK_UPS, LOOK_UPS, 2, 0]
    assert [req for found in looked for req in found] == reqs[1:]


def test_prompts_that_begin_alike_for_less_than_a_page_share_nothing() -> None:
    same = [*range(70)]
    one, other = _request("a", *same, 1), _request("b", *same, 2)
    for page_tokens, alike in ((1, True), (16, True), (64, True), (128, False)):
        groups = PrefixGroups(page_tokens)
        assert (groups.opened(one) == groups.opened(other) != 0) == alike


def test_of_a_crowd_that_begins_alike_nobody_is_looked_up_once_it_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than are looked up at one planning: the rest are admitted before their turn, and hold KV by then."""
    shared = list(range(10, 10 + SHARED_TOKENS))
    count, find, held = 4 * LOOK_UPS, tree.find_prefix, []

    def found(cache: Any, req: Any) -> None:
        held.append(kv.row_of(req) is not None)
        find(cache, req)

    def script(scheduler: Any, iteration: int) -> list[Any]:
        if getattr(scheduler, "slo_on", False):
            invariants.check(scheduler)
        if iteration > 1:
            return []
        return [real.request(f"r{i}", [*shared, 100 + i, 7], 6) for i in range(count)]

    monkeypatch.setattr(tree, "find_prefix", found)
    argv = ["--max-total-tokens", "20000", "--page-size", "4"]
    run = real.run(script, count, argv, folder)
    assert run.tokens == real.run(script, count, argv, folder, False).tokens
    assert held and not any(held)
