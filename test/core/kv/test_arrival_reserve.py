"""KV left for arrivals in a hurry: as much as came lately, bounded, and none where none came."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_slo.core.kv.arrival_reserve import WINDOW_S, ArrivalReserve


def test_without_arrivals_nothing_is_held_back() -> None:
    assert ArrivalReserve(1000).tokens(5.0) == 0


@given(st.lists(st.tuples(st.floats(0, 200), st.integers(1, 500)), max_size=40), st.floats(0, 60))
def test_it_is_what_the_last_seconds_brought_but_no_more_than_allowed(
    arrivals: list[tuple[float, int]], later: float
) -> None:
    reserve, arrivals = ArrivalReserve(2000), sorted(arrivals)
    for at, tokens in arrivals:
        reserve.arrived(at, tokens)
    now = (arrivals[-1][0] if arrivals else 0.0) + later
    assert reserve.tokens(now) == min(sum(n for at, n in arrivals if at >= now - WINDOW_S), 2000)
