"""The campaign's short form: a thousand requests and some dozen faults in virtual time (more: SGLANG_SLO_CAMPAIGN=1)."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from campaign.fuzz import fuzzed
from campaign.known import KNOWN
from campaign.sweep import Order, campaign

SEED = 7  # its first world is a crowded one
LONG = bool(os.environ.get("SGLANG_SLO_CAMPAIGN"))
REQUESTS = 20_000 if LONG else 1200  # of the short form, in one world


def test_nothing_breaks_whatever_of_ours_raises() -> None:
    """Exceptions at entries by chance, clocks, lies and failed copies; `python benchmark/campaign twin` tries them all."""
    found = campaign(Order(requests=REQUESTS, seed=SEED, sweep=False, worlds=1), lambda line: None)
    assert found.tally.ended == found.tally.arrived == REQUESTS or found.breaks
    assert not found.breaks, "\n".join(f"{b.what} | {b.fault} | {b.world}" for b in found.breaks)
    assert found.tally.commands["abort"] > 0 and sum(found.tally.faults.values()) > 0
    assert found.tally.preemptions or not LONG  # many worlds


def test_the_same_seed_does_the_same() -> None:
    one, two = (
        campaign(Order(200, SEED, sweep=False, worlds=1), lambda line: None).plain() for _ in range(2)
    )
    del one["cpu_s"], two["cpu_s"]
    assert one == two


@pytest.mark.parametrize("seed", range(3))
def test_fuzzed_requests_are_the_same_for_the_same_seed(seed: int) -> None:
    one, two = ([fuzzed(rng) for _ in range(200)] for rng in (random.Random(seed), random.Random(seed)))
    assert one == two
    assert len({sent.path for sent in one}) > 8


def test_each_input_that_once_broke_something_is_covered_by_a_test_that_exists() -> None:
    root = Path(__file__).parents[1]
    for test in KNOWN.values():
        file, _, name = test.partition("::")
        assert f"def {name}" in (root / file).read_text(), test
