"""The latency model: a monotone prediction, its exact inverse, and files that say what is wrong with them."""

from __future__ import annotations

import json
import math
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sglang_slo.core.latency import (
    VERSION,
    BatchShape,
    Coefficients,
    LatencyModel,
    ProfileError,
    decode_shape,
)

H200 = Coefficients(6e-3, 1e-3, 2.7e-5, 1.3e-9, 4e-3, 3.3e-8)

fixed_s = st.floats(0, 0.1)
coefficients = st.builds(
    Coefficients,
    t0_extend=fixed_s,
    t0_decode=fixed_s,
    c_tok=st.one_of(st.just(0.0), st.floats(1e-7, 1e-2)),
    c_attn=st.one_of(st.just(0.0), st.floats(1e-13, 1e-6)),
    w=fixed_s,
    c_kv=st.one_of(st.just(0.0), st.floats(1e-12, 1e-5)),
    c_req=st.one_of(st.just(0.0), st.floats(1e-6, 1e-2)),
)
shapes = st.builds(
    BatchShape,
    extend=st.booleans(),
    new_tokens=st.integers(0, 20_000),
    pairs=st.floats(0, 1e9),
    context_tokens=st.integers(0, 1_000_000),
    requests=st.integers(0, 500),
)
histories = st.integers(0, 200_000)


@settings(deadline=None)
@given(coefficients, shapes, histories, st.floats(0, 2.0))
@example(Coefficients(0.0, 0.0, 0.0, 0.0, 0.01, 1e-24), BatchShape(True), 0, 0.01)
@example(Coefficients(0.0, 0.0, 1e-23, 0.0, 0.01, 0.0), BatchShape(True), 0, 0.01)
@example(Coefficients(0.0, 0.0, 0.0, 1e-30, 0.0, 0.0), BatchShape(True, 1, 1e9), 0, 1e-20)
@example(Coefficients(0.0, 0.0, 0.0, 1e-200, 0.0, 0.0), BatchShape(True), 0, 1e-200)
@example(Coefficients(0.0, 0.0, 1e-5, 0.0, 0.0, 0.0), BatchShape(True), 0, math.inf)
def test_largest_chunk_is_exact_to_a_token(
    c: Coefficients, base: BatchShape, history: int, time_s: float
) -> None:
    model = LatencyModel(c)
    n = model.largest_chunk(base, history, time_s)
    most = 10**9
    assert 0 <= n <= most
    if n > 0:
        assert model.iteration_s(base.with_chunk(history, n)) <= time_s
    if n < most:
        assert model.iteration_s(base.with_chunk(history, n + 1)) > time_s


@settings(deadline=None)
@given(coefficients, shapes, histories, st.floats(0, 2.0), st.floats(1.0, 2.0))
def test_largest_safe_chunk_is_exact_to_a_token(
    c: Coefficients, base: BatchShape, history: int, time_s: float, margin: float
) -> None:
    model = LatencyModel(c, margin_extend=margin)
    n = model.largest_safe_chunk(base, history, time_s)
    assert n == 0 or model.safe_iteration_s(base.with_chunk(history, n)) <= time_s
    assert n == 10**9 or model.safe_iteration_s(base.with_chunk(history, n + 1)) > time_s


@given(coefficients, shapes, histories, st.integers(1, 10_000), st.integers(0, 10_000))
def test_more_prefill_never_takes_less_time(
    c: Coefficients, base: BatchShape, history: int, tokens: int, more: int
) -> None:
    model = LatencyModel(c)
    assume(base.extend)
    small = model.iteration_s(base.with_chunk(history, tokens))
    assert model.iteration_s(base) <= small <= model.iteration_s(base.with_chunk(history, tokens + more))
    assert small <= model.iteration_s(base.with_chunk(history + more, tokens))


@given(coefficients, st.integers(1, 500), st.integers(0, 10**6), st.integers(0, 10**6))
def test_more_context_never_takes_less_time(c: Coefficients, requests: int, context: int, more: int) -> None:
    model = LatencyModel(c)
    assert model.iteration_s(decode_shape(requests, context)) <= model.iteration_s(
        decode_shape(requests, context + more)
    )


@given(shapes, histories, st.integers(1, 5000))
def test_a_chunk_costs_its_own_history(base: BatchShape, history: int, tokens: int) -> None:
    """Cut in two, a chunk makes as many query-context pairs as whole."""
    whole = base.with_chunk(history, 2 * tokens)
    halves = base.with_chunk(history, tokens).with_chunk(history + tokens, tokens)
    assert halves.pairs == pytest.approx(whole.pairs)
    assert halves.new_tokens == whole.new_tokens


def test_prefill_seconds_are_those_of_arrays() -> None:
    model = LatencyModel(H200)
    histories, tokens = np.array([0, 10, 5000]), np.array([1, 100, 2000])
    alone = [model.prefill_s(int(h), int(n)) for h, n in zip(histories, tokens, strict=True)]
    assert model.prefill_s_array(histories, tokens) == pytest.approx(alone)


def test_the_safe_time_is_longer_by_the_margin_of_its_kind() -> None:
    model = LatencyModel(H200, margin_extend=1.3, margin_decode=1.1)
    alone, mixed = decode_shape(8, 10_000), decode_shape(8, 10_000, beside_prefill=True).with_chunk(0, 300)
    assert model.safe_iteration_s(alone) == pytest.approx(1.1 * model.iteration_s(alone))
    assert model.safe_iteration_s(mixed) == pytest.approx(1.3 * model.iteration_s(mixed))


@given(coefficients, st.lists(st.tuples(st.integers(1, 500), st.integers(0, 10**6)), min_size=1))
def test_safe_times_of_decodes_are_those_of_arrays(c: Coefficients, batches: list[tuple[int, int]]) -> None:
    model = LatencyModel(c, margin_decode=1.2)
    requests, contexts = np.array(batches, np.int64).T
    alone = [model.safe_iteration_s(decode_shape(*batch)) for batch in batches]
    assert model.safe_decode_s_array(requests, contexts) == pytest.approx(alone, rel=1e-12)


def test_decodes_beside_a_prefill_take_their_attention_on_top() -> None:
    """Nothing hides it: not the compute of a long chunk, not the reading of the weights."""
    model = LatencyModel(H200)
    for tokens in (1, 4096):
        chunk = BatchShape(True).with_chunk(0, tokens)
        reading = replace(chunk, context_tokens=chunk.context_tokens + 100_000)
        added = model.iteration_s(reading) - model.iteration_s(chunk)
        assert added == pytest.approx(100_000 * H200.c_kv)


def test_a_scaled_model_takes_as_much_longer() -> None:
    shape = BatchShape(True, 8, 0.0, 10_000).with_chunk(100, 500)
    model = LatencyModel(H200)
    assert model.scaled(1.25).iteration_s(shape) == pytest.approx(1.25 * model.iteration_s(shape))


# -- files


def test_a_saved_profile_is_read_back(tmp_path: Path) -> None:
    model = LatencyModel(H200, 1.07, 1.05, "h200", 800_000, True, meta={"key": {"tp": 2}})
    model.save(tmp_path / "p.json")
    assert LatencyModel.load(tmp_path / "p.json") == model
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


def _raw(**changes: Any) -> dict[str, Any]:
    names = Coefficients.__dataclass_fields__
    good: dict[str, Any] = {"version": VERSION, "coefficients": dict(zip(names, astuple(H200), strict=True))}
    for name, value in changes.items():
        (good["coefficients"] if name in names else good)[name] = value
    return good


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (_raw(c_tok=-1.0), "c_tok"),
        (_raw(w=float("nan")), "coefficients.w"),
        (_raw(c_kv="fast"), "c_kv"),
        (_raw(t0_extend=True), "t0_extend"),
        (_raw(speed=3), "speed"),
        (_raw(margin_extend="high"), "margin_extend"),
        (_raw(margin_decode=0.5), "margin_decode"),
        (_raw(residual_quantile=1.2), "residual_quantile"),
        (_raw(version=1), "version: need 2"),
        (_raw(version="2"), "version"),
        (_raw(kv_capacity_tokens=-5), "kv_capacity_tokens"),
        (_raw(swap_bytes_per_s=0.0), "swap_bytes_per_s"),
        (_raw(meta=[1]), "meta"),
        (_raw(name=7), "name"),
        ({}, "coefficients"),
        ([], "coefficients"),
    ],
)
def test_a_bad_profile_names_the_file_and_the_field(tmp_path: Path, raw: Any, named: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ProfileError, match=named) as error:
        LatencyModel.load(path)
    assert str(path) in str(error.value)


def test_a_profile_of_the_first_form_is_refused_and_told_what_to_do(tmp_path: Path) -> None:
    raw = _raw(residual_quantile=1.1)
    del raw["version"]
    (tmp_path / "old.json").write_text(json.dumps(raw))
    with pytest.raises(ProfileError, match=r"old\.json: version: need 2.*sglang_slo\.profile"):
        LatencyModel.load(tmp_path / "old.json")


def test_a_missing_coefficient_is_named(tmp_path: Path) -> None:
    raw = _raw()
    del raw["coefficients"]["c_attn"]
    (tmp_path / "p.json").write_text(json.dumps(raw))
    with pytest.raises(ProfileError, match="c_attn"):
        LatencyModel.load(tmp_path / "p.json")


def test_a_profile_without_a_term_per_request_has_none(tmp_path: Path) -> None:
    raw = _raw()
    del raw["coefficients"]["c_req"]
    (tmp_path / "p.json").write_text(json.dumps(raw))
    assert LatencyModel.load(tmp_path / "p.json") == LatencyModel(H200)


@given(coefficients, st.integers(1, 500), st.integers(0, 10**6))
def test_each_request_more_takes_its_own_time(c: Coefficients, requests: int, context: int) -> None:
    """Where reading the weights bounds the layers, so that a token more costs nothing."""
    model = LatencyModel(replace(c, c_tok=0.0))
    few, many = (model.iteration_s(decode_shape(n, context)) for n in (requests, 2 * requests))
    assert many - few == pytest.approx(requests * c.c_req, abs=1e-9)


@pytest.mark.parametrize("text", ["", "{", "not json"])
def test_a_file_that_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ProfileError, match=r"p\.json"):
        LatencyModel.load(tmp_path / "p.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="nowhere"):
        LatencyModel.load(tmp_path / "nowhere.json")
