"""The door: whatever an endpoint makes of a request, its limits arrive; what cannot be used is refused by name."""

from __future__ import annotations

import json
from collections import UserDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

from bad_limits import BAD, BODY
from sglang_slo.config import SloConfig
from sglang_slo.core.slo import Slo, SloClass
from sglang_slo.server.body import SILENT, read_body
from sglang_slo.server.door import WARM_UP, WARM_UP_PROMPTS, Door
from sglang_slo.server.errors import FieldError
from sglang_slo.server.limits import LimitError, WireSlo, slo_of
from sglang_slo.server.visit import VISIT, Visit

CONFIG = SloConfig(
    classes={"chat": SloClass(500, 50), "batch": SloClass()},
    service_tiers={"flex": "batch", "priority": "chat"},
    objectives={"fast": "chat"},
)
CHAT = Slo(0.5, 0.05, "chat")


@contextmanager
def visiting(
    body: Any = None, headers: dict[str, str] | None = None, config: SloConfig = CONFIG
) -> Iterator[Visit]:
    """A visit over HTTP that brought this body (text: as it is) and these headers."""
    visit = Visit("/generate", [(k.encode(), v.encode()) for k, v in (headers or {}).items()], config)
    text = body if isinstance(body, str) else json.dumps(body or {})
    visit._chunks.append(text.encode("utf-8", "surrogatepass"))
    token = VISIT.set(visit)
    try:
        yield visit
    finally:
        VISIT.reset(token)


def through(
    obj: Any, body: Any = None, headers: dict[str, str] | None = None, config: SloConfig = CONFIG
) -> Any:
    """What SGLang is given in the place of `obj`."""
    with visiting(body, headers, config):
        Door(config).hook(lambda manager, obj, request: obj, None, obj)
    return obj


def slos(obj: Any) -> list[Slo]:
    params = obj.sampling_params if isinstance(obj.sampling_params, list) else [obj.sampling_params]
    for row in params:
        assert isinstance(row["custom_params"]["slo"], WireSlo)
    return [slo_of(row["custom_params"], SloConfig()) for row in params]


def one(**fields: Any) -> GenerateReqInput:
    return GenerateReqInput(text="a", **fields)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"slo": {"class": "chat"}}, {}),
        ({"custom_params": {"slo": {"class": "chat"}}}, {}),  # an endpoint that does not carry it
        ({}, {"x-slo-class": "chat"}),
        ({}, {"tracestate": "a=b,slo=class:chat"}),
        ({"metadata": {"slo_class": "chat"}}, {}),
        ({"custom_labels": {"slo_class": "chat"}}, {}),
        ({"service_tier": "priority"}, {}),
        ({}, {"x-llm-d-inference-objective": "fast"}),
        ({}, {"x-gateway-inference-objective": "chat"}),
        ({"instances": [{"text": "a", "slo": {"class": "chat"}}]}, {}),
    ],
)
def test_a_class_arrives_however_it_is_said(body: Any, headers: dict[str, str]) -> None:
    obj = GenerateReqInput(text=["a"]) if "instances" in body else one()
    assert slos(through(obj, body, headers)) == [CHAT]


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"service_tier": "auto"}, {}),
        ({"metadata": {"team": "slo"}}, {}),
        ({"metadata": "slo_class"}, {}),
        ({}, {"x-llm-d-inference-objective": "unheard-of"}),
        ({}, {"tracestate": "slow=1"}),
        ({"text": "slo"}, {}),
        ("[1, 2", {"accept": "slo"}),
    ],
)
def test_what_is_no_limit_leaves_the_request_as_it_came(body: Any, headers: dict[str, str]) -> None:
    for params in (None, {"temperature": 0}, {"custom_params": {"a": 1}}):
        assert through(one(sampling_params=params), body, headers).sampling_params is params


SOURCES: list[tuple[dict[str, Any], dict[str, str]]] = [  # strongest first; all say another TTFT limit
    ({"slo": {"ttft_ms": 1}}, {}),
    ({"metadata": {"slo_ttft_ms": "2"}}, {}),
    ({}, {"x-slo-ttft-ms": "3"}),
    ({}, {"tracestate": "slo=ttft:4"}),
    ({"service_tier": "priority"}, {}),
    ({}, {"x-llm-d-inference-objective": "batch"}),
]


@pytest.mark.parametrize("strongest", range(len(SOURCES)))
def test_stronger_beats_weaker(strongest: int) -> None:
    body, headers = {}, {}
    for more_body, more_headers in SOURCES[strongest:]:
        body, headers = {**body, **more_body}, {**headers, **more_headers}
    [slo] = slos(through(one(), body, headers))
    assert slo.ttft_s == [0.001, 0.002, 0.003, 0.004, 0.5, float("inf")][strongest]
    assert slo.slo_class == ("chat" if strongest < 5 else "batch")


def test_a_header_written_with_underscores_is_not_passed_over() -> None:
    assert slos(through(one(), {}, {"X_Slo_Ttft_Ms": "3"}))[0].ttft_s == 0.003
    with pytest.raises(LimitError, match="x-slo-ttft-ms"):
        through(one(), {}, {"x_slo_ttft_ms": "-3"})


def test_the_rest_of_the_request_is_kept_and_the_callers_own_dict_is_not_touched() -> None:
    params = {"temperature": 0, "custom_params": {"a": 1, "slo": {"class": "chat"}}}
    obj = through(one(sampling_params=params))
    assert obj.sampling_params["temperature"] == 0 and obj.sampling_params["custom_params"]["a"] == 1
    assert slos(obj) == [CHAT] and params["custom_params"]["slo"] == {"class": "chat"}


@pytest.mark.parametrize("prompts", [{"text": ["a", "b"]}, {"input_ids": [[1], [2]]}])
@pytest.mark.parametrize(
    "params", [None, {"max_new_tokens": 1}, [{"max_new_tokens": 1}, {"max_new_tokens": 2}]]
)
def test_each_item_of_a_batch_can_have_its_own_limit(prompts: dict[str, Any], params: Any) -> None:
    obj = GenerateReqInput(**prompts, sampling_params=params)
    assert [s.slo_class for s in slos(through(obj, {"slo": [{"class": "chat"}, None]}))] == [
        "chat",
        "default",
    ]
    obj = GenerateReqInput(**prompts, sampling_params=params)
    assert slos(through(obj, {"slo": {"class": "chat"}})) == [CHAT, CHAT]


@pytest.mark.parametrize(
    ("obj", "body", "field"),
    [
        (one(), {"slo": [{"class": "chat"}]}, "slo"),
        (GenerateReqInput(text=["a", "b"]), {"slo": [{"class": "chat"}]}, "slo"),
        (GenerateReqInput(text=["a", "b"]), {"slo": [{"class": "chat"}, {"class": "gold"}]}, "slo[1].class"),
        (one(), {"SLO": {"class": "chat"}}, "SLO"),
        (one(sampling_params={"custom_params": {"Slo": 1}}), {}, "sampling_params.custom_params.Slo"),
        (one(sampling_params={"custom_params": [1]}), {}, "sampling_params.custom_params"),
        (one(sampling_params=[]), {}, "sampling_params"),
        (
            one(sampling_params={"custom_params": {"slo": {"class": "chat"}}}),
            {"slo": {"ttft_ms": 5}},
            "at odds",
        ),
        (one(), {"metadata": {"slo_ttft_ms": "soon"}}, "metadata.slo_ttft_ms"),
        (one(), {"metadata": {"slo_tftt_ms": "5"}}, "metadata.slo_tftt_ms"),
        (one(), {"custom_labels": {"slo_ttft_ms": [5]}}, "custom_labels.slo_ttft_ms"),
        (one(), '{"slo": {"class": "chat"}, "slo": {"class": "batch"}}', "slo: given twice"),
        (one(), {"slo": {"ttft_ms": 5}, "instances": [{"slo": {"ttft_ms": 6}}]}, "instances.slo"),
        (one(sampling_params={"n": 10**9}), {}, "n"),
        (one(sampling_params={"n": "2"}), {}, "n"),
    ],
)
def test_a_misplaced_limit_is_refused_by_name(obj: Any, body: Any, field: str) -> None:
    with pytest.raises(FieldError, match=field.replace("[", r"\[")):
        through(obj, body)


@pytest.mark.parametrize("kind", [GenerateReqInput, EmbeddingReqInput])
@pytest.mark.parametrize(("name", "body", "headers", "field"), BAD, ids=[row[0] for row in BAD])
def test_a_bad_limit_is_refused_by_name(
    kind: Any, name: str, body: str | None, headers: dict[str, str], field: str
) -> None:
    with visiting("{}" if body is None else f'{{"slo": {body}}}', headers) as visit:
        with pytest.raises(LimitError) as caught:
            Door(CONFIG).hook(lambda *_: None, None, kind(text="a"))
        assert field in str(caught.value)
        assert visit.refused is caught.value


@pytest.mark.parametrize(("name", "body", "headers", "field"), BODY, ids=[row[0] for row in BODY])
def test_a_bad_limit_in_custom_params_is_refused_too(name: str, body: str, headers: Any, field: str) -> None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return
    if name == "duplicate field":  # gone where SGLang has parsed the body; read_body sees it
        return
    with pytest.raises(LimitError, match=r"sampling_params\.custom_params\.slo"):
        through(one(sampling_params={"custom_params": {"slo": value}}))


def test_ids_come_out_of_what_a_chat_template_returns() -> None:
    # else SGLang's /api/chat answers 500
    obj = through(GenerateReqInput(input_ids=UserDict({"input_ids": [5, 6], "attention_mask": [1, 1]})))
    assert obj.input_ids == [5, 6]


def test_embeddings_are_checked_and_otherwise_left_alone() -> None:
    obj = through(EmbeddingReqInput(text="a"), {"slo": {"class": "chat"}})
    assert obj.sampling_params is None


def test_the_first_request_of_a_visit_counts_from_the_arrival_of_its_body() -> None:
    with visiting({"slo": {"class": "chat"}}) as visit:
        visit._arrived_s = -5.0
        first, second = one(), one()
        for obj in (first, second):
            Door(CONFIG).hook(lambda *_: None, None, obj)
    assert first.sampling_params["custom_params"]["slo"].received_s == -5.0
    assert second.sampling_params["custom_params"]["slo"].received_s > 0


def test_a_server_that_requires_limits_refuses_what_comes_without() -> None:
    config = SloConfig(classes=CONFIG.classes, require=True)
    with pytest.raises(LimitError, match="without a limit"):
        through(one(), config=config)
    assert slos(through(one(), {"slo": {"class": "batch"}}, config=config))[0].best_effort
    for own in (
        {"text": "a", "rid": "HEALTH_CHECK_1"},
        {"text": [WARM_UP_PROMPTS[0]] * 2},
        {"input_ids": [10, 11, 12]},
    ):
        through(GenerateReqInput(**own, sampling_params=dict(WARM_UP)), config=config)  # SGLang's own


@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda t: ('{"slo": ' + t).encode("utf-8", "surrogatepass"))
)
def test_any_body_is_refused_by_name_or_read(body: bytes) -> None:
    try:
        read_body(body, CONFIG)
    except LimitError as error:
        assert str(error).isascii()


@pytest.mark.parametrize("depth", [400, 900, 965, 966, 1000, 1023, 1024, 1100, 100_000])
def test_a_deep_body_is_read_or_refused_and_never_an_error_of_ours(depth: int) -> None:
    deep = "[" * depth + "]" * depth
    assert read_body(f'{{"text": "slo", "other": {deep}}}'.encode(), CONFIG).own is None
    limited = f'{{"slo": {{"class": "chat"}}, "other": {deep}}}'.encode()
    try:
        said = read_body(limited, CONFIG)
    except LimitError as error:
        assert "nested" in str(error)
    else:  # above SGLang's own limit it is no JSON
        assert said == SILENT if depth >= 1024 else said.own == {"class": "chat"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_other_encodings_are_read_too(encoding: str) -> None:
    assert read_body('{"slo": {"class": "chat"}}'.encode(encoding), CONFIG).own == {"class": "chat"}


def test_a_limit_hidden_in_escapes_is_found() -> None:
    assert read_body(b'{"\\u0073lo": {"class": "chat"}}', CONFIG).own == {"class": "chat"}
