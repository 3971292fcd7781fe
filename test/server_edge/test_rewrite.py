"""The rewritten body: limits in SGLang's custom_params, everything else as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bad_limits import BAD, BODY
from sglang_slo import clock
from sglang_slo.config import SloConfig
from sglang_slo.core.slo import SloClass
from sglang_slo.server.limits import NOTHING, LimitError, parse_headers
from sglang_slo.server.rewrite import rewrite

CONFIG = SloConfig(classes={"chat": SloClass(500, 50)})
CHAT = {"ttft_ms": 500.0, "tbt_ms": 50.0, "class": "chat", "received_s": 7.0, "resolved": True}
FIVE = {**CHAT, "ttft_ms": 5.0, "tbt_ms": None, "class": "default"}


@pytest.fixture(autouse=True)
def at_seven() -> Any:
    clock.use(lambda: 7.0)
    yield
    clock.use(None)


def native(request: Any, headers: dict[str, str] | None = None) -> Any:
    return json.loads(
        rewrite(json.dumps(request).encode(), parse_headers((headers or {}).items()), True, CONFIG)
    )


def openai(request: Any, headers: dict[str, str] | None = None) -> Any:
    return json.loads(
        rewrite(json.dumps(request).encode(), parse_headers((headers or {}).items()), False, CONFIG)
    )


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[1]",
        b'"slo"',
        b'{"text": "slo"}',
        b'{"text": "a", "slo": null}',
        b"\xff\xfe",
        b"[" * 5000,
    ],
)
def test_a_body_without_limits_passes_as_the_same_bytes(body: bytes, is_native: bool) -> None:
    assert rewrite(body, NOTHING, is_native, CONFIG) is body


@given(st.dictionaries(st.text(), st.none() | st.text() | st.integers() | st.floats()))
def test_what_is_not_a_limit_is_kept(request: dict[str, Any]) -> None:
    if any(key.lower() in ("slo", "custom_params") for key in request):
        return
    text = json.dumps({**request, "slo": {"ttft_ms": 5}})
    new = rewrite(text.encode(), NOTHING, False, CONFIG)
    kept = json.loads(new)
    assert kept.pop("custom_params") == {"slo": FIVE}
    assert json.dumps(kept, sort_keys=True) == json.dumps(request, sort_keys=True)


def test_native_limits_go_into_the_sampling_parameters() -> None:
    request = {"text": "a", "slo": {"class": "chat"}, "sampling_params": {"max_new_tokens": 3}}
    assert native(request) == {
        "text": "a",
        "sampling_params": {"max_new_tokens": 3, "custom_params": {"slo": CHAT}},
    }
    assert native({"text": "a"}, {"x-slo-class": "chat"})["sampling_params"] == {
        "custom_params": {"slo": CHAT}
    }


def test_openai_limits_go_to_the_top_beside_other_custom_parameters() -> None:
    request = {"prompt": "a", "slo": {"class": "chat"}, "custom_params": {"mine": 1}}
    assert openai(request) == {"prompt": "a", "custom_params": {"mine": 1, "slo": CHAT}}


def test_one_limit_serves_a_whole_batch() -> None:
    got = native({"text": ["a", "b"], "slo": {"class": "chat"}, "sampling_params": {"n": 1}})
    assert got["sampling_params"] == {"n": 1, "custom_params": {"slo": CHAT}}


@pytest.mark.parametrize("prompts", [{"text": ["a", "b"]}, {"input_ids": [[1], [2, 3]]}])
def test_each_item_of_a_batch_can_have_its_own_limit(prompts: dict[str, Any]) -> None:
    got = native({**prompts, "slo": [{"ttft_ms": 5}, None], "sampling_params": {"n": 1}})
    assert got["sampling_params"] == [{"n": 1, "custom_params": {"slo": FIVE}}, {"n": 1}]
    rows = [{"custom_params": {"slo": {"ttft_ms": 5}}}, {"n": 2}]
    got = native({**prompts, "sampling_params": rows}, {"x-slo-class": "chat"})
    first, second = (row["custom_params"]["slo"] for row in got["sampling_params"])
    assert first == {**CHAT, "ttft_ms": 5.0} and second == CHAT


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"text": ["a", "b"], "slo": [{"ttft_ms": 5}]}, "slo"),
        ({"text": ["a", "b"], "slo": [{"ttft_ms": 5}, {"ttft_ms": -5}]}, r"slo\[1\]\.ttft_ms"),
        ({"input_ids": [1, 2], "slo": [{"ttft_ms": 5}]}, "slo"),
        ({"text": "a", "SLO": {"ttft_ms": 5}}, "SLO"),
        ({"text": "a", "slo": {"ttft_ms": 5}, "sampling_params": 3}, "sampling_params"),
        ({"text": ["a", "b"], "slo": {"ttft_ms": 5}, "sampling_params": [{}]}, "sampling_params"),
        ({"text": "a", "sampling_params": {"custom_params": {"slo": {"x": 5}}}}, r"custom_params\.slo\.x"),
        ({"text": "a", "sampling_params": {"custom_params": {"Slo": {"ttft_ms": 5}}}}, r"custom_params\.Slo"),
        ({"text": "a", "sampling_params": {"custom_params": "slo"}}, r"sampling_params\.custom_params"),
        (
            {
                "text": "a",
                "slo": {"ttft_ms": 5},
                "sampling_params": {"custom_params": {"slo": {"ttft_ms": 6}}},
            },
            "at odds",
        ),
    ],
)
def test_a_misplaced_limit_is_refused_by_name(request_: dict[str, Any], field: str) -> None:
    with pytest.raises(LimitError, match=field):
        native(request_)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize(("name", "body", "headers", "field"), BAD, ids=[row[0] for row in BAD])
def test_a_bad_limit_is_refused_by_name(
    name: str, body: str | None, headers: dict[str, str], field: str, is_native: bool
) -> None:
    text = '{"text": "a", "prompt": "a"%s}' % (f', "slo": {body}' if body is not None else "")
    with pytest.raises(LimitError, match=field):
        rewrite(text.encode(), parse_headers(headers.items()), is_native, CONFIG)


@pytest.mark.parametrize(("name", "body", "headers", "field"), BODY, ids=[row[0] for row in BODY])
def test_a_bad_limit_in_custom_params_is_refused_too(
    name: str, body: str, headers: dict[str, str], field: str
) -> None:
    text = f'{{"prompt": "a", "custom_params": {{"slo": {body}}}}}'
    with pytest.raises(LimitError):
        rewrite(text.encode(), NOTHING, False, CONFIG)


def test_a_limit_hidden_in_escapes_is_found() -> None:
    body = rb'{"prompt": "a", "\u0073lo": {"class": "chat"}}'
    assert json.loads(rewrite(body, NOTHING, False, CONFIG))["custom_params"] == {"slo": CHAT}


@pytest.mark.parametrize("value", ["1" * 30, '"\\ud800"', "NaN", "-Infinity"])
def test_json_that_other_parsers_refuse_is_left_as_it_is(value: str) -> None:
    body = f'{{"slo": {{"class": "chat"}}, "seed": {value}}}'
    assert json.dumps(json.loads(value)).encode() in rewrite(body.encode(), NOTHING, False, CONFIG)
