"""The judge against slow and obvious definitions; each rule's cheapest trick is judged as missed where it should be."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_slo.core.attainment import (
    LIMIT_REASONS,
    RULES,
    Deliveries,
    Figures,
    deliveries_of,
    deliveries_of_tokens,
    gap_limit_s,
    kept_by_rule,
    misses,
    p99_s,
    rank_from_top,
    ratio,
    reasons_of,
)
from sglang_slo.core.deliveries import DeliveryTable, GapTail
from sglang_slo.core.slo import BEST_EFFORT, GapRule, Slo

gap_lists = st.lists(st.floats(0, 1e3, allow_nan=False), max_size=700)
limits = st.one_of(st.just(math.inf), st.sampled_from([0.25, 0.5, 1.0, 3.0]))
slos = st.builds(
    Slo,
    ttft_s=limits,
    tbt_s=limits,
    slo_class=st.just("c"),
    tpot_s=limits,
    e2e_s=limits,
    gap_rule=st.sampled_from(list(GapRule)),
    max_pause_s=limits,
)
# quarters of a second: exact in floating point, and often equal to a limit
streams = st.lists(st.tuples(st.integers(1, 16).map(lambda n: n / 4), st.integers(1, 4)), max_size=250)


def token_times(stream: list[tuple[float, int]], first_s: float = 10.0) -> list[float]:
    """The time of each token of deliveries that are (gap before, tokens); the first comes at `first_s`."""
    now_s, times = first_s, []
    for k, (gap_s, tokens) in enumerate(stream):
        now_s += gap_s if k else 0.0
        times += [now_s] * tokens
    return times


def obviously_kept(rule: str, times: list[float], limit_s: float) -> bool:
    """Each rule word for word, token by token."""
    if not times or math.isinf(limit_s):
        return True
    moments = sorted(set(times))
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    if rule == "every":
        return all(gap <= limit_s for gap in gaps)
    if rule == "paced":
        return all(time <= times[0] + i * limit_s for i, time in enumerate(times))
    if rule == "p99":
        return 100 * sum(gap > limit_s for gap in gaps) <= len(gaps)
    return len(times) == 1 or (times[-1] - times[0]) / (len(times) - 1) <= limit_s + 1e-12


@given(streams, limits, st.sampled_from([9.5, 9.75, 10.0]))
def test_each_rule_is_its_obvious_definition(
    stream: list[tuple[float, int]], limit_s: float, arrival_s: float
) -> None:
    times, slo = token_times(stream), Slo(ttft_s=0.25, tbt_s=limit_s, e2e_s=60.0)
    deliveries = deliveries_of_tokens(times, slo) if times else Deliveries(end_s=10.0)
    kept = kept_by_rule(slo, deliveries.figures(arrival_s))
    assert tuple(kept) == RULES
    others = 10.0 - arrival_s <= 0.25 and (times[-1] if times else 10.0) - arrival_s <= 60.0
    for rule in RULES:
        assert kept[rule] == (others and obviously_kept(rule, times, limit_s)), rule


@given(streams.filter(bool), slos)
def test_reasons_are_exactly_the_declared_limits_that_were_passed(
    stream: list[tuple[float, int]], slo: Slo
) -> None:
    times = token_times(stream)
    rule = {GapRule.EVERY: "every", GapRule.PACE: "paced", GapRule.P99: "p99"}[slo.gap_rule]
    longest_s = max([b - a for a, b in itertools.pairwise(times)], default=0.0)
    expected = {
        "ttft": slo.ttft_s < 1.0,
        "gap": slo.gap_rule != GapRule.PACE and not obviously_kept(rule, times, slo.tbt_s),
        "pause": slo.gap_rule == GapRule.P99 and longest_s > slo.max_pause_s,
        "pace": slo.gap_rule == GapRule.PACE and not obviously_kept(rule, times, slo.tbt_s),
        "tpot": not obviously_kept("mean", times, slo.tpot_s),
        "e2e": times[-1] - 9.0 > slo.e2e_s,
    }
    reasons = reasons_of(slo, deliveries_of_tokens(times, slo).figures(9.0))
    assert set(reasons) == {reason for reason, missed in expected.items() if missed}


def test_one_pause_is_a_miss_by_every_rule_but_the_99th_percentile_and_that_has_its_own_bound() -> None:
    times = token_times([(0.05, 1)] * 200 + [(420.0, 1)] + [(0.05, 1)] * 200)
    slo = Slo(tbt_s=0.05)
    kept = kept_by_rule(slo, deliveries_of_tokens(times, slo).figures(10.0))
    assert kept == {"every": False, "paced": False, "p99": True, "mean": False}
    bounded = Slo(tbt_s=0.05, gap_rule=GapRule.P99, max_pause_s=0.5)
    assert reasons_of(bounded, deliveries_of_tokens(times, bounded).figures(10.0)) == ("pause",)


def test_a_burst_at_the_end_is_a_miss_by_every_rule_but_the_mean() -> None:
    times = token_times([(0.0, 1), (9.9, 99)])
    slo = Slo(tbt_s=0.1)
    kept = kept_by_rule(slo, deliveries_of_tokens(times, slo).figures(10.0))
    assert kept == {"every": False, "paced": False, "p99": False, "mean": True}


def test_starving_one_gap_in_a_hundred_is_a_miss_by_every_gap_and_by_pace() -> None:
    times = token_times(([(0.05, 1)] * 99 + [(0.5, 1)]) * 3 + [(0.05, 1)])
    slo = Slo(tbt_s=0.05)
    kept = kept_by_rule(slo, deliveries_of_tokens(times, slo).figures(10.0))
    assert kept == {"every": False, "paced": False, "p99": True, "mean": False}
    twice = token_times(([(0.05, 1)] * 98 + [(0.5, 1)] * 2) * 3 + [(0.05, 1)])
    assert not kept_by_rule(slo, deliveries_of_tokens(twice, slo).figures(10.0))["p99"]


def test_running_ahead_buys_a_reader_a_pause_and_no_other_rule_forgives_it() -> None:
    times = token_times([(0.0, 1)] + [(0.05, 10)] * 4 + [(3.0, 1)])  # 40 tokens ahead, then 3 s without any
    paced, every = (Slo(tbt_s=0.1, gap_rule=rule) for rule in (GapRule.PACE, GapRule.EVERY))
    assert reasons_of(paced, deliveries_of_tokens(times, paced).figures(10.0)) == ()
    assert reasons_of(every, deliveries_of_tokens(times, every).figures(10.0)) == ("gap",)


def test_the_first_token_of_a_burst_is_the_late_one() -> None:
    times, slo = token_times([(0.0, 1), (0.25, 8)]), Slo(tbt_s=0.125, gap_rule=GapRule.PACE)
    assert deliveries_of_tokens(times, slo).pace_lag_s == 0.125


def test_only_a_mean_was_declared_and_each_rule_reads_it() -> None:
    slo = Slo(tpot_s=0.5)
    figures = deliveries_of_tokens(token_times([(0.0, 1), (0.25, 1), (0.75, 1)]), slo).figures(10.0)
    assert gap_limit_s(slo) == 0.5
    assert kept_by_rule(slo, figures) == {"every": False, "paced": True, "p99": False, "mean": True}
    assert reasons_of(slo, figures) == ()


def test_several_reasons_may_hold_and_what_equals_its_limit_is_kept() -> None:
    slo = Slo(ttft_s=1.0, tbt_s=0.25, tpot_s=0.25, e2e_s=2.0)
    figures = deliveries_of_tokens([10.0, 10.25, 10.5], slo).figures(9.0)
    assert reasons_of(slo, figures) == ()
    late = deliveries_of_tokens([10.0, 10.25, 12.0], slo).figures(8.75)
    assert reasons_of(slo, late) == ("ttft", "gap", "tpot", "e2e")


def test_best_effort_misses_nothing() -> None:
    figures = Figures(1e9, 1e9, 1e9, 1e9, 1e9, 1e9)
    assert reasons_of(BEST_EFFORT, figures) == ()
    assert all(kept_by_rule(BEST_EFFORT, figures).values())
    assert (ratio(5.0, math.inf), ratio(5.0, 2.5)) == (0.0, 2.0)


@given(st.lists(st.tuples(slos, streams.filter(bool)), min_size=1, max_size=5))
def test_columns_of_many_are_judged_as_each_one_alone(
    many: list[tuple[Slo, list[tuple[float, int]]]],
) -> None:
    class Columns:
        pass

    table, alone = Columns(), []
    for name in ("ttft_s", "tbt_s", "tpot_s", "e2e_s", "gap_rule", "max_pause_s"):
        setattr(table, name, np.array([getattr(slo, name) for slo, _ in many], float))
    for slo, stream in many:
        alone.append(deliveries_of_tokens(token_times(stream), slo).figures(9.0))
    names = Figures.__dataclass_fields__
    figures = Figures(*(np.array([getattr(f, name) for f in alone]) for name in names))
    found, kept = misses(table, figures), kept_by_rule(table, figures)  # type: ignore[arg-type]
    for i, (slo, _) in enumerate(many):
        assert tuple(r for r in LIMIT_REASONS if found[r][i]) == reasons_of(slo, alone[i])
        assert {rule: bool(kept[rule][i]) for rule in RULES} == kept_by_rule(slo, alone[i])


# -- the percentile


@given(gap_lists.filter(bool))
def test_p99_is_the_smallest_gap_that_covers_99_percent(gaps: list[float]) -> None:
    figure = p99_s(gaps)
    assert figure in gaps
    assert sum(g <= figure for g in gaps) >= 0.99 * len(gaps)
    shorter = [g for g in gaps if g < figure]
    assert not shorter or sum(g <= max(shorter) for g in gaps) < 0.99 * len(gaps)


@given(st.integers(1, 10**6))
def test_rank_counts_from_the_top_what_nearest_rank_counts_from_the_bottom(n: int) -> None:
    assert rank_from_top(n) == n - -(-99 * n // 100) + 1


def test_with_fewer_than_100_gaps_the_figure_is_the_longest() -> None:
    assert p99_s([0.1] * 98 + [9.0]) == 9.0
    assert p99_s([0.1] * 99 + [9.0]) == 0.1


@given(gap_lists, st.integers(1, 90), st.integers(0, 500))
def test_tail_gives_the_same_figure_as_all_gaps(gaps: list[float], piece: int, spare: int) -> None:
    tail = GapTail(len(gaps) + spare)
    for start in range(0, len(gaps), piece):
        tail.extend(gaps[start : start + piece])
        assert tail.p99_s == p99_s(gaps[: start + piece])
    assert tail.count == len(gaps)
    assert tail.max_s == max(gaps, default=0.0)


@given(gap_lists, st.integers(0, 100))
def test_tail_that_was_promised_too_few_gaps_never_flatters(gaps: list[float], promised: int) -> None:
    tail = GapTail(promised)
    tail.extend(gaps)
    assert tail.p99_s >= p99_s(gaps)


def test_tail_of_a_hundred_thousand_gaps_keeps_about_one_percent() -> None:
    tail = GapTail(100_000)
    gaps = np.random.default_rng(0).exponential(size=100_000)
    for part in np.split(gaps, 1000):
        tail.extend(part)
    assert tail._longest.size <= 1001
    assert tail.p99_s == p99_s(gaps)


# -- the table of streams


@given(
    st.lists(st.dictionaries(st.integers(0, 20), st.integers(1, 4), min_size=1), max_size=60),
    st.integers(1, 5),
    slos,
)
def test_table_gives_each_stream_what_a_look_at_all_of_it_gives(
    iterations: list[dict[int, int]], block: int, slo: Slo
) -> None:
    table = DeliveryTable(slots=2, block=block)
    seen: dict[int, list[float]] = {slot: [] for slot in range(21)}
    for slot in seen:
        table.open(slot, slo, 240)
    for step, got in enumerate(iterations):
        table.add(np.array(list(got)), step / 4, np.array(list(got.values())))
        for slot, tokens in got.items():
            seen[slot] += [step / 4] * tokens
    for slot, times in seen.items():
        assert table.tokens(np.array([slot])) == [len(times)]
        assert table.close(slot) == deliveries_of_tokens(times, slo)


@given(streams.filter(bool), st.integers(0, 20), slos)
def test_what_was_given_up_is_judged_as_if_its_next_token_had_come_then(
    stream: list[tuple[float, int]], waited: int, slo: Slo
) -> None:
    table, times = DeliveryTable(), token_times(stream)
    table.open(0, slo, 2000)
    for moment in sorted(set(times)):
        table.add(np.array([0]), moment, times.count(moment))
    left_s = times[-1] + (waited + 1) / 4
    found = table.close(0, left_s)
    assert found.tokens == len(times)
    assert found.figures(9.0) == deliveries_of_tokens([*times, left_s], slo).figures(9.0)


def test_what_never_got_a_token_waited_until_it_was_given_up() -> None:
    table = DeliveryTable()
    table.open(0, Slo(ttft_s=1.0), 10)
    figures = table.close(0, 12.0).figures(10.0)
    assert (figures.ttft_s, figures.e2e_s, figures.max_gap_s) == (2.0, 2.0, 0.0)


def test_reopened_slot_forgets_the_request_before() -> None:
    table, slot = DeliveryTable(slots=1), np.array([0])
    table.open(0, Slo(tbt_s=0.1), 5)
    table.add(slot, 1.0, 3)
    table.add(slot, 9.0)
    table.open(0, BEST_EFFORT, 5)
    table.add(slot, 10.0)
    table.add(slot, 11.0)
    assert table.close(0) == Deliveries(2, 1, 10.0, 11.0, 11.0, 1.0, 1.0, 1.0, 0.0)
    with pytest.raises(KeyError):
        table.close(0)


def test_deliveries_of_unknown_sizes_may_share_their_tokens_evenly() -> None:
    found = deliveries_of([1.0, 2.0, 3.0], [1.0, 1.5, 1.5], Slo(tbt_s=0.5))
    assert (found.tokens, found.gaps, found.tpot_s) == (4, 2, 2 / 3)
    assert found.pace_lag_s == pytest.approx(0.75)  # the last of them behind 2.5 tokens at half a second each
