"""Room in KV for who has waited long, and for who is in a hurry: on time, and at no price to those who leave."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from sglang_slo.core.plan import HOLD_UP_S
from sglang_slo.core.slo import Slo
from sglang_slo.runtime.make_room import RoomMaker
from sglang_slo.twin import driver
from sglang_slo.twin.workload import Workload, load_workload

CHAT, BATCH, CODE = 0, 1, 2
CAPACITY = 12_000
HOST = pytest.mark.parametrize(
    "flags", [[], ["--slo-host-kv-gb", "40", "--slo-preempt", "swap"]], ids=["no host", "host"]
)


def workload(rows: list[tuple[float, int, int, int]]) -> Workload:
    """`rows`: arrival s, class, input and output tokens. A chat starts within 5 s, code within 0.6; a token each 100 ms."""
    like = load_workload("reason-generated")
    rows = sorted(rows)
    arrival_s, class_id, input_tokens, output_tokens = (
        np.array(column) for column in zip(*rows, strict=True)
    )
    return replace(
        like,
        profile=replace(like.profile, kv_capacity_tokens=CAPACITY),
        class_names=["chat", "batch", "code"],
        limits=[Slo(5.0, 0.1), Slo(math.inf, math.inf), Slo(0.6, 0.1)],
        class_id=class_id,
        arrival_s=arrival_s,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        blocks=[None] * len(rows),
    )


@HOST
def test_one_that_fits_only_into_an_almost_empty_pool_waits_no_longer_than_until_nobody_overtakes_it(
    flags: list[str],
) -> None:
    chats = [(12.0 * i, CHAT, 200, 3000) for i in range(25)]
    result = driver.run(workload([*chats, (30.0, BATCH, 8000, 50)]), "slo", flags)
    rows = result.requests
    large = rows.class_id == BATCH
    assert HOLD_UP_S < rows.ttft_s[large][0] < HOLD_UP_S + 5
    assert rows.preemptions.sum() > 0
    assert rows.finished.all()
    # three arrivals at most find the pool taken by it
    assert rows.attained[~large].sum() >= len(chats) - 3


@HOST
def test_arrivals_in_a_hurry_find_room_among_those_with_gaps_to_spare(flags: list[str]) -> None:
    long = [(0.1 * i, CHAT, 200, 3500) for i in range(4)]
    burst = [(50.0 + 0.1 * i, CHAT, 1000, 100) for i in range(2)]
    rows = driver.run(workload([*long, *burst]), "slo", flags).requests
    assert rows.attained.all()
    assert rows.preemptions.sum() > 0


def test_arrivals_in_a_hurry_do_not_wait_for_room_that_is_needed_only_later() -> None:
    """Nobody can spare a gap yet, and those that run will fill the pool, but not before victims can be found."""
    long = [(0.01 * i, CHAT, 300, 1000) for i in range(28)]
    burst = [(4.0, CODE, 200, 100) for _ in range(3)]
    rows = driver.run(workload([*long, *burst]), "slo").requests
    assert (rows.ttft_s <= rows.ttft_limit_s).all()


def test_nobody_comes_back_from_the_host_past_one_that_nobody_overtakes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nobody can leave for it, it waits until those that run have ended, and for no others."""
    monkeypatch.setattr(RoomMaker, "_enough", lambda *_: None)
    chats = [(2.0 * i, CHAT, 200, 3000) for i in range(30)]
    flags = ["--slo-host-kv-gb", "40", "--slo-preempt", "swap", "--slo-max-preemptions", "50"]
    rows = driver.run(workload([*chats, (30.0, BATCH, 10_000, 50)]), "slo", flags).requests
    assert rows.ttft_s[rows.class_id == BATCH][0] < HOLD_UP_S + 60
