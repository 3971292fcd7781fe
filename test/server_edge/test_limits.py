"""Limits: what is accepted, what beats what, and that nothing is ever replaced by a default in silence."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bad_limits import BAD
from sglang_slo.classes import read_classes
from sglang_slo.config import ConfigError, SloConfig
from sglang_slo.core.slo import BEST_EFFORT, MAX_LIMIT_MS, MIN_LIMIT_MS, GapRule, Slo, SloClass
from sglang_slo.server.headers import parse_headers, parse_tracestate
from sglang_slo.server.limits import (
    FIELDS,
    NOTHING,
    LimitError,
    Limits,
    WireSlo,
    parse,
    received_s,
    resolve,
    slo_of,
    to_wire,
)

CHAT = SloClass(500, 50, importance=3)
CLASSES = {"chat": CHAT, "batch": SloClass(), "paper": SloClass(500, 50, percentile=99, max_pause_ms=200)}
CLASSES["reader"] = SloClass(500, 50, pace=True)
CONFIG = SloConfig(classes=CLASSES)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from((*FIELDS, "x", "\ud800")), inner)
    ),
    max_leaves=8,
)


def asked(body: Any = None, headers: dict[str, str] | None = None) -> Limits:
    pairs = list((headers or {}).items())
    return parse(body).over(parse_headers(pairs)).over(parse_tracestate(pairs))


@given(json_values)
def test_any_value_is_refused_by_name_or_becomes_finite_limits(value: Any) -> None:
    try:
        slo = resolve(parse(value), CONFIG)
    except LimitError as error:
        assert error.field.startswith("slo") and str(error).startswith(error.field)
        assert len(str(error)) < 400 and str(error).isascii() and "\n" not in str(error)
        return
    assert min(slo.ttft_s, slo.tbt_s, slo.tpot_s, slo.e2e_s, slo.max_pause_s) >= MIN_LIMIT_MS / 1e3
    assert slo.slo_class in {*CLASSES, "custom", "default"}
    assert (slo.max_pause_s < math.inf) == (slo.gap_rule is GapRule.P99)
    if slo.gap_rule is not GapRule.EVERY:
        assert slo.tbt_s < math.inf
    assert slo.max_pause_s >= slo.tbt_s or slo.gap_rule is not GapRule.P99


@given(st.dictionaries(st.text(), json_values) | json_values)
def test_what_a_client_writes_into_custom_params_is_text_whatever_it_claims(custom: Any) -> None:
    for params in (custom, {"slo": custom}):
        try:
            slo = slo_of(params, CONFIG)
        except LimitError:
            continue
        assert received_s(params) is None
        assert slo.slo_class in {*CLASSES, "custom", "default"}


@pytest.mark.parametrize("wrong", [{"class": ["a"]}, {"class": "gold"}, {"ttft_ms": "x"}, {"ttft_ms": 0}, {}])
def test_a_forged_mark_of_the_server_is_refused(wrong: dict[str, Any]) -> None:
    forged = {"ttft_ms": 500, "tbt_ms": 50, "class": "chat", "received_s": 0, "resolved": True, **wrong}
    with pytest.raises(LimitError):
        slo_of({"slo": forged}, CONFIG)


def test_the_scheduler_reads_back_what_the_door_wrote() -> None:
    slo = resolve(parse({"class": "paper", "ttft_ms": 7}), CONFIG)
    custom = pickle.loads(pickle.dumps({"slo": to_wire(slo, 12.5), "other": 1}))
    assert isinstance(custom["slo"], WireSlo)
    assert slo_of(custom, SloConfig()) == slo and received_s(custom) == 12.5


@pytest.mark.parametrize(("name", "body", "headers", "field"), BAD, ids=[row[0] for row in BAD])
def test_a_bad_limit_is_refused_by_name(
    name: str, body: str | None, headers: dict[str, str], field: str
) -> None:
    try:
        value = None if body is None else json.loads(body)
    except (ValueError, RecursionError):  # refused where the body is read
        return
    if name in ("duplicate field", "list for a single request"):
        return
    with pytest.raises(LimitError) as caught:
        resolve(asked(value, headers), CONFIG)
    assert field in str(caught.value)
    assert len(str(caught.value)) < 600


EVERY, PACE, P99 = GapRule.EVERY, GapRule.PACE, GapRule.P99


@pytest.mark.parametrize(
    ("body", "headers", "wanted"),
    [
        (None, {}, Slo(9, 0.9, "default")),
        ({"class": "chat"}, {}, Slo(0.5, 0.05, "chat", importance=3)),
        ({"class": "batch"}, {}, Slo(slo_class="batch")),
        ({"ttft_ms": 100}, {}, Slo(0.1, 0.9, "custom")),
        ({"ttft_ms": None, "tbt_ms": None}, {}, Slo(slo_class="custom")),
        (
            {"ttft_ms": 100},
            {"x-slo-ttft-ms": "200", "x-slo-class": "chat"},
            Slo(0.1, 0.05, "chat", importance=3),
        ),
        (None, {"x-slo-tpot-ms": "40"}, Slo(9, 0.9, "custom", tpot_s=0.04)),
        (
            None,
            {"x-llm-d-slo-tpot-ms": "40", "x-slo-e2e-s": "2"},
            Slo(9, 0.9, "custom", tpot_s=0.04, e2e_s=2),
        ),
        (None, {"X_Slo_Ttft_Ms": "5", "x-slo_tbt-ms": "2.5s"}, Slo(0.005, 2.5, "custom")),
        (None, {"x-sgl-slo-ttft-us": "5000", "x-slo-tbt-ms": "2.5s"}, Slo(0.005, 2.5, "custom")),
        (None, {"x-slo-ttft-ms": "0"}, Slo(1e-6, 0.9, "custom")),
        (None, {"tracestate": "a=b, slo=class:chat;ttft:7;tbt:1s"}, Slo(0.007, 1, "chat", importance=3)),
        (None, {"tracestate": "slo=ttft:7", "x-slo-ttft-ms": "8"}, Slo(0.008, 0.9, "custom")),
        ({"class": "paper"}, {}, Slo(0.5, 0.05, "paper", gap_rule=P99, max_pause_s=0.2)),
        ({"class": "paper", "pace": True}, {}, Slo(0.5, 0.05, "paper", gap_rule=PACE)),
        ({"class": "paper", "percentile": None}, {}, Slo(0.5, 0.05, "paper")),
        ({"class": "paper", "tbt_ms": 400}, {}, Slo(0.5, 0.4, "paper", gap_rule=P99, max_pause_s=4)),
        ({"class": "paper", "tbt_ms": None}, {}, Slo(0.5, slo_class="paper")),
        ({"class": "reader"}, {}, Slo(0.5, 0.05, "reader", gap_rule=PACE)),
        ({"class": "reader", "pace": False}, {}, Slo(0.5, 0.05, "reader")),
        ({"class": "reader", "percentile": 99}, {}, Slo(0.5, 0.05, "reader", gap_rule=P99, max_pause_s=0.5)),
        (
            {"tbt_ms": 10, "percentile": 99, "max_pause_ms": 30},
            {},
            Slo(9, 0.01, "custom", gap_rule=P99, max_pause_s=0.03),
        ),
    ],
)
def test_body_beats_header_beats_class_beats_default(body: Any, headers: dict[str, str], wanted: Slo) -> None:
    config = SloConfig(classes=CLASSES, ttft_ms=9000, tbt_ms=900)
    assert resolve(asked(body, headers), config) == wanted


def test_numbers_without_a_class_do_not_count_for_the_default_class() -> None:
    config = SloConfig(classes=CLASSES, default_class="chat")
    assert resolve(NOTHING, config).slo_class == "chat"
    slo = resolve(parse({"ttft_ms": 7}), config)
    assert (slo.slo_class, slo.ttft_s, slo.tbt_s) == ("custom", 0.007, 0.05)


def test_floors_hold_for_every_limit() -> None:
    config = SloConfig(min_ttft_ms=100, min_tbt_ms=20)
    slo = resolve(
        parse({"ttft_ms": 1, "e2e_ms": 2, "tpot_ms": 3, "tbt_ms": 4, "percentile": 99, "max_pause_ms": 5}),
        config,
    )
    assert slo == Slo(0.1, 0.02, "custom", 0.02, 0.1, P99, 0.02)


@pytest.mark.parametrize("field", [f for f in FIELDS if f != "class"])
def test_classes_only_takes_nothing_else(field: str) -> None:
    config = SloConfig(classes=CLASSES, classes_only=True)
    value = {"pace": True, "percentile": 99}.get(field, 500)
    with pytest.raises(LimitError, match=f"slo.{field}"):
        resolve(parse({"class": "chat", field: value}), config)
    assert resolve(parse({"class": "chat"}), config).slo_class == "chat"


def test_without_limits_a_request_is_best_effort() -> None:
    assert resolve(NOTHING, SloConfig()) == BEST_EFFORT == slo_of(None, SloConfig())


def test_a_header_given_twice_must_agree() -> None:
    assert parse_headers([("x-slo-ttft-ms", "5"), ("X-SLO-TTFT-S", "0.005")]).given == {"ttft_ms": 5}
    with pytest.raises(LimitError, match="given twice"):
        parse_headers([("x-slo-ttft-ms", "5"), ("x-slo-ttft-ms", "6")])


@given(
    st.sampled_from(["x-slo-ttft-ms", "x-slo-tbt-s", "x-slo-pace", "x-slo-class", "tracestate", "x-slo-"]),
    st.text(),
)
def test_any_header_is_refused_by_name_or_taken(name: str, text: str) -> None:
    text = "slo=" + text if name == "tracestate" else text
    try:
        resolve(asked(None, {name: text}), CONFIG)
    except LimitError as error:
        assert error.field.startswith(name) and len(str(error)) < 400


@given(st.lists(st.tuples(st.sampled_from(["accept", "x-slow", "slo", "x-slo", "traceparent"]), st.text())))
def test_other_headers_are_nobodys_business(headers: list[tuple[str, str]]) -> None:
    assert parse_headers(headers) == NOTHING == parse_tracestate(headers)


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ({"ttft_ms": 0}, "ttft_ms"),
        ({"tpot_ms": math.nan}, "tpot_ms"),
        ({"e2e_ms": MAX_LIMIT_MS * 2}, "e2e_ms"),
        ({"pace": 1}, "pace"),
        ({"pace": True}, "pace"),
        ({"percentile": 95, "tbt_ms": 5}, "percentile"),
        ({"percentile": 99, "pace": True, "tbt_ms": 5}, "pace"),
        ({"max_pause_ms": 5, "tbt_ms": 5}, "max_pause_ms"),
        ({"importance": 1.5}, "importance"),
        ({"importance": True}, "importance"),
        ({"ttft": 5}, "ttft"),
    ],
)
def test_a_class_that_makes_no_sense_is_refused_by_name(limits: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"classes\.chat\.{field}"):
        read_classes({"chat": limits}, "slo.yaml")


@pytest.mark.parametrize("field", ["ttft_ms", "tbt_ms", "tpot_ms", "e2e_ms"])
def test_a_default_that_nobody_can_keep_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field.replace("_", "-")):
        SloConfig(**{field: 0})


def test_names_of_other_systems_stand_for_classes_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"service_tiers\.flex"):
        SloConfig(classes=CLASSES, service_tiers={"flex": "gold"})
    config = SloConfig(classes=CLASSES, service_tiers={"flex": "batch"}, objectives={"fast": "chat"})
    assert SloConfig.from_json(config.to_json()) == config


def test_asking_for_the_verdict_is_no_limit() -> None:
    strict = SloConfig(classes=CLASSES, classes_only=True)
    assert resolve(asked({"verdict": True}), strict).slo_class == "default"
    assert resolve(asked({"class": "chat", "verdict": True}), strict) == CHAT.slo("chat")
    assert resolve(asked(headers={"x-slo-verdict": "true"}), CONFIG).best_effort
