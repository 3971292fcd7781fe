"""Trusted limits reach the scheduler unchanged, and nothing is sent that would end it."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import (
    GenerateReqInput,
    TokenizedGenerateReqInput,
    msgpack_decode,
    msgpack_encode,
)
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_slo.config import SloConfig
from sglang_slo.core.slo import Slo
from sglang_slo.server import wire
from sglang_slo.server.door import Door
from sglang_slo.server.errors import FieldError
from sglang_slo.server.inputs import checked
from sglang_slo.server.limits import to_wire

WIRE = to_wire(Slo(0.5, 0.05, "chat"), 12.5)
VOCABULARY = 512


@pytest.fixture(params=[True, False], ids=["pickle", "msgpack"])
def pickled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways in which SGLang sends requests to its scheduler."""
    monkeypatch.setattr(io_struct, "_USE_PICKLE_IPC", request.param)
    return bool(request.param)


def sent_over(request: TokenizedGenerateReqInput, pickled: bool) -> TokenizedGenerateReqInput:
    wire.wrap(TokenizedGenerateReqInput.wrap_pickle_fields, request)
    arrived = pickle.loads(pickle.dumps(request)) if pickled else msgpack_decode(msgpack_encode(request))
    wire.unwrap(TokenizedGenerateReqInput.unwrap_pickle_fields, arrived)
    return arrived


def tokenized(params: dict[str, Any] | None = None, **fields: Any) -> TokenizedGenerateReqInput:
    sampling = SamplingParams(**(params or {}))
    sampling.normalize(None)
    given = {
        "input_text": None,
        "input_ids": io_struct.array("q", [1, 2]),
        "input_embeds": None,
        "mm_inputs": None,
    }
    given |= {"token_type_ids": None, "return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0}
    given |= {"token_ids_logprob": None, "stream": True, "rid": "a", "time_stats": APIServerReqTimeStats()}
    return TokenizedGenerateReqInput(sampling_params=sampling, **{**given, **fields})


@pytest.mark.parametrize("custom", [{"slo": WIRE}, {"slo": WIRE, "other": 1}])
def test_limits_arrive_as_they_were_sent(custom: dict[str, Any], pickled: bool) -> None:
    sent = tokenized({"custom_params": custom})
    shared = sent.sampling_params
    arrived = sent_over(sent, pickled)
    assert shared.custom_params == custom, "other samples of the request share it"
    assert arrived.sampling_params.custom_params == custom
    assert isinstance(arrived.time_stats, APIServerReqTimeStats)


@pytest.mark.parametrize("custom", [None, {"other": 1}, {"slo": {"ttft_ms": 5, "resolved": True}}])
def test_without_trusted_limits_nothing_changes(custom: Any, pickled: bool) -> None:
    arrived = sent_over(tokenized({"custom_params": custom}), pickled)
    assert arrived.sampling_params.custom_params == custom


def test_every_field_that_the_check_passes_over_exists_in_sglang() -> None:
    assert wire._UNCHECKED.keys() <= set(TokenizedGenerateReqInput.__struct_fields__)


@pytest.mark.parametrize(
    ("params", "fields", "named"),
    [
        ({"skip_special_tokens": 9223372036854775807}, {}, "sampling_params.skip_special_tokens"),
        ({"ignore_eos": 2}, {}, "sampling_params.ignore_eos"),
        ({"max_new_tokens": 1.5}, {}, "sampling_params.max_new_tokens"),
        ({"max_new_tokens": 2**70}, {}, "sampling_params"),
        ({}, {"input_ids": io_struct.array("q", [512])}, "input_ids"),
        ({}, {"input_ids": io_struct.array("q", [-1])}, "input_ids"),
        ({}, {"input_ids": io_struct.array("q", [])}, "text or prompt"),
        ({}, {"input_ids": None}, "text or prompt"),
        ({}, {"top_logprobs_num": 513}, "top_logprobs_num"),
        ({}, {"top_logprobs_num": -1}, "top_logprobs_num"),
        ({}, {"logprob_start_len": -2}, "logprob_start_len"),
        ({"min_new_tokens": 0, "stream_interval": -1}, {}, "sampling_params.stream_interval"),
        ({"sampling_seed": 2**63}, {}, "sampling_params.sampling_seed"),
        ({"top_k": 2**31}, {}, "sampling_params.top_k"),
        ({"logit_bias": {"5": float("nan")}}, {}, "logit_bias"),
        ({"logit_bias": {"5": 3e38}}, {}, "logit_bias"),
        ({"repetition_penalty": 1e-45}, {}, "repetition_penalty"),
        ({}, {"logprob_start_len": 1.5}, "logprob_start_len"),
        ({}, {"token_ids_logprob": ["a"]}, "token_ids_logprob"),
        # one of a list for each of several prompts, with one prompt alone
        ({}, {"top_logprobs_num": [1]}, "top_logprobs_num"),
        ({}, {"logprob_start_len": [0]}, "logprob_start_len"),
        ({}, {"token_ids_logprob": [[1]]}, "token_ids_logprob"),
        ({}, {"return_logprob": [True]}, "return_logprob"),
        ({}, {"return_hidden_states": [True]}, "return_hidden_states"),
        ({}, {"custom_logit_processor": ["x"]}, "custom_logit_processor"),
        ({}, {"lora_id": ["x"]}, "lora_id"),
        ({}, {"priority": "1"}, "priority"),
        ({}, {"bootstrap_room": ["x"]}, "bootstrap_room"),
    ],
)
def test_what_the_scheduler_could_not_read_or_survive_is_refused_by_name(
    params: dict[str, Any], fields: dict[str, Any], named: str, pickled: bool
) -> None:
    manager = SimpleNamespace(model_config=SimpleNamespace(vocab_size=VOCABULARY))
    with pytest.raises(FieldError) as caught:
        checked(lambda *_: tokenized(params, **fields), manager, GenerateReqInput(input_ids=[1]))
    assert caught.value.field.startswith(named), caught.value


def test_a_least_length_that_no_tensor_holds_is_refused_by_name(pickled: bool) -> None:
    manager, request = SimpleNamespace(model_config=SimpleNamespace(vocab_size=VOCABULARY)), tokenized()
    request.sampling_params.min_new_tokens = 2**31  # SGLang takes it beside a maximum as large
    with pytest.raises(FieldError, match="min_new_tokens"):
        checked(lambda *_: request, manager, GenerateReqInput(input_ids=[1]))


ODD = (True, -1, 2**70, 1e308, float("nan"), "", [], {}, [[]], [None], {"a": {"b": []}}, [1], [[1]], ["a"])


@pytest.mark.parametrize("struct", [TokenizedGenerateReqInput, io_struct.TokenizedEmbeddingReqInput])
def test_whatever_a_field_holds_it_is_refused_by_name_or_passes(struct: Any) -> None:
    for name, _ in wire._field_types(struct):
        for value in ODD:
            request = SimpleNamespace(
                **{other: None for other, _ in wire._field_types(struct)} | {name: value}
            )
            try:
                wire.check_plain(struct, request)
            except FieldError as error:
                assert error.field == name


@pytest.mark.parametrize(
    ("params", "fields", "named"),
    [
        ({"custom_params": {"a": {"b": {"c": 1}}}}, {}, "sampling_params.custom_params"),
        ({"custom_params": {"slo": WIRE, "a": [[1]]}}, {}, "sampling_params.custom_params"),
    ],
)
def test_as_msgpack_the_scheduler_reads_by_type(
    params: dict[str, Any], fields: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io_struct, "_USE_PICKLE_IPC", False)
    with pytest.raises(FieldError) as caught:
        wire.check(tokenized(params, **fields))
    assert caught.value.field == named
    monkeypatch.setattr(io_struct, "_USE_PICKLE_IPC", True)
    wire.check(tokenized(params, **fields))


def test_an_ordinary_request_passes(pickled: bool) -> None:
    manager = SimpleNamespace(model_config=SimpleNamespace(vocab_size=VOCABULARY))
    params = {"logit_bias": {"5": 1.0}, "stop_token_ids": [7], "custom_params": {"slo": WIRE}}
    request = tokenized(params)
    assert checked(lambda *_: request, manager, GenerateReqInput(input_ids=[1])) is request


def test_once_tokenized_a_request_is_what_the_client_sent() -> None:
    # SGLang's exporters write it as JSON
    manager = SimpleNamespace(model_config=SimpleNamespace(vocab_size=VOCABULARY))
    obj = GenerateReqInput(text="a", sampling_params={"custom_params": {"slo": {"ttft_ms": 5}}})
    Door(SloConfig()).hook(lambda *_: None, None, obj)
    checked(lambda manager, obj: tokenized(obj.sampling_params), manager, obj)
    assert obj.sampling_params == {"custom_params": {"slo": {"ttft_ms": 5}}}


def test_a_request_may_pass_the_door_twice() -> None:
    obj = GenerateReqInput(text="a", sampling_params={"custom_params": {"slo": WIRE}})
    Door(SloConfig(ttft_ms=7)).hook(lambda *_: None, None, obj)
    assert obj.sampling_params["custom_params"]["slo"].slo.ttft_s == 0.007
