"""The campaign's short form: a few thousand requests and some hundred faults in virtual time, and a little of the rest."""

from __future__ import annotations

import random

import pytest

from campaign.fuzz import fuzzed
from campaign.sweep import Order, campaign

SEED = 11


def test_nothing_breaks_whatever_of_ours_raises() -> None:
    """Exceptions at entries by chance, clocks, lies and failed copies; `python benchmark/campaign twin` tries them all."""
    found = campaign(Order(requests=3000, seed=SEED, sweep=False, worlds=1), lambda line: None)
    assert found.tally.ended == found.tally.arrived == 3000 or found.breaks
    assert not found.breaks, "\n".join(f"{b.what} | {b.fault} | {b.world}" for b in found.breaks)
    assert found.tally.preemptions and found.tally.commands["abort"] > 0


def test_the_same_seed_does_the_same() -> None:
    one, two = (
        campaign(Order(400, SEED, sweep=False, worlds=1), lambda line: None).plain() for _ in range(2)
    )
    del one["cpu_s"], two["cpu_s"]
    assert one == two


@pytest.mark.parametrize("seed", range(3))
def test_fuzzed_requests_are_the_same_for_the_same_seed(seed: int) -> None:
    one, two = ([fuzzed(rng) for _ in range(200)] for rng in (random.Random(seed), random.Random(seed)))
    assert one == two
    assert len({sent.path for sent in one}) > 8
