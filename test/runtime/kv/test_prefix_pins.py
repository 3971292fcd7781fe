"""Pins hold what is in the tree now, and look for it no more often than there is news."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_slo.runtime.kv import prefix_pins
from sglang_slo.runtime.kv.prefix_pins import Pins


class Scene:
    """Requests by row, a tree that is a set of nodes, and a count of look-ups."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.table: Any = SimpleNamespace(history_tokens=np.zeros(4, int), pinned_tokens=np.zeros(4, int))
        self.in_tree: dict[int, int] = {}  # row -> node
        self.looked = 0
        self.locked: list[int] = []
        fake = SimpleNamespace(
            keeps_unfinished=lambda _: True,
            kept_by=self.kept_by,
            unlock=lambda _, node: self.locked.remove(node),
        )
        monkeypatch.setattr(prefix_pins, "tree", fake)
        self.pins = Pins(None, self.table, 1000, self.look_up)  # type: ignore[arg-type]
        self.req: Any = SimpleNamespace(slo_row=1, last_node=None)

    def look_up(self, req: Any) -> None:
        self.looked += 1
        req.last_node = self.in_tree.get(req.slo_row)
        self.table.history_tokens[req.slo_row] = 10 * (req.last_node is not None)

    def kept_by(self, _: Any, node: int) -> tuple[int, int]:
        assert node in self.in_tree.values(), "a node that is not in the tree was locked"
        self.locked.append(node)
        return node, 10


def test_one_with_nothing_cached_is_not_looked_up_in_every_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    for _ in range(5):
        scene.pins.keep([scene.req])
    assert scene.looked == 1 and not scene.locked


def test_what_was_found_meanwhile_is_looked_for_again_before_it_is_pinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch)
    scene.pins.keep([scene.req])
    scene.in_tree[1] = 7
    scene.look_up(scene.req)  # news from elsewhere
    scene.in_tree[1] = 8  # evicted, and computed anew
    scene.pins.keep([scene.req])
    assert scene.locked == [8]
    assert scene.table.pinned_tokens[1] == 10


def test_all_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.in_tree[1] = 7
    scene.pins.keep([scene.req])
    scene.pins.keep([])
    assert not scene.locked and scene.pins.tokens == 0
