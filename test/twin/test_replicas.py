"""Replicas: every request goes to exactly one, and the fewest that reach a target are found."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_slo.twin.plan import fewest
from sglang_slo.twin.replicas import ROUTERS, assigned, share_of
from sglang_slo.twin.workloads.workload import load_workload


@pytest.mark.parametrize("router", ROUTERS)
def test_every_request_goes_to_exactly_one_replica_as_it_is(router: str) -> None:
    whole = load_workload("agent-generated", max_requests=60)
    parts = [share_of(whole, k, 3, router) for k in range(3)]
    assert sum(len(p) for p in parts) == 60
    assert sorted(a for p in parts for a in p.arrival_s.tolist()) == whole.arrival_s.tolist()
    row = int(np.flatnonzero(assigned(whole, 3, router) == 1)[0])
    assert (parts[1].input_tokens[0], parts[1].blocks[0]) == (whole.input_tokens[row], whole.blocks[row])


def test_the_least_loaded_gets_the_next_one() -> None:
    whole = load_workload("mix-generated", max_requests=300, load=5.0)
    loads = {r: [share_of(whole, k, 4, r).input_tokens.sum() for k in range(4)] for r in ROUTERS}
    assert np.ptp(loads["least_loaded"]) < np.ptp(loads["round_robin"])


def test_an_unknown_router_is_named() -> None:
    with pytest.raises(ValueError, match="router"):
        assigned(load_workload("mix-generated", max_requests=4), 2, "dice")


@pytest.mark.parametrize("need", range(1, 17))
def test_the_fewest_replicas_are_found(need: int) -> None:
    found, tried = fewest(lambda n: 1.0 if n >= need else 0.5, 0.99, most=16)
    assert found == need and len(tried) <= 9
    assert fewest(lambda n: 0.5, 0.99, most=16)[0] == 0
