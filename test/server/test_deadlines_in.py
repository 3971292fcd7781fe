"""Deadlines over HTTP: good ones arrive at the scheduler, bad ones get 400 and harm nobody."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bad_limits import BAD
from conftest import Server
from sglang_slo.cpu.demo_model import demo_model_path

pytestmark = pytest.mark.server

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"model": "m", "messages": MESSAGES, "max_tokens": 2}
OLLAMA = {"model": "m", "options": {"num_predict": 2}}
ENDPOINTS: dict[str, dict[str, Any]] = {  # each that generates
    "/generate": {"text": "hello", "sampling_params": {"max_new_tokens": 2}},
    "/v1/completions": {"model": "m", "prompt": "hello", "max_tokens": 2},
    "/v1/chat/completions": CHAT,
    "/invocations": CHAT,
    "/v1/messages": CHAT,
    "/v1/responses": {"model": str(demo_model_path()), "input": "hi", "max_output_tokens": 2, "store": False},
    "/vertex_generate": {
        "instances": [{"text": "hello"}],
        "parameters": {"sampling_params": {"max_new_tokens": 2}},
    },
    "/api/chat": {**OLLAMA, "messages": MESSAGES},
    "/api/generate": {**OLLAMA, "prompt": "hello"},
}
NOT_STREAMING = ("/vertex_generate",)
BATCHES = ("/vertex_generate", "/v1/score")  # always, be it of one
ONLY_CHECKED = {  # nothing is generated: limits are read and refused, not kept
    "/v1/score": {"model": "m", "query": "a", "items": ["b"], "label_token_ids": [20, 21]},
    "/v1/embeddings": {"model": "m", "input": "hello"},
    "/encode": {"text": "hello"},
}


# Four ways to say a limit: headers, and fields of the body for /generate and for OpenAI's endpoints.
WAYS: list[tuple[str, dict[str, str], dict[str, Any], dict[str, Any]]] = [
    ("custom", {"x-slo-ttft-ms": "60000", "x-slo-tbt-ms": "60000"}, {}, {}),
    ("chat", {"x-slo-class": "chat"}, {}, {}),
    ("custom", {}, {"slo": {"ttft_ms": 60000}}, {"slo": {"ttft_ms": 60000}}),
    (
        "chat",
        {},
        {"sampling_params": {"max_new_tokens": 2, "custom_params": {"slo": {"class": "chat"}}}},
        {"custom_params": {"slo": {"class": "chat"}}},
    ),
]


def judged(server: Server) -> dict[str, int]:
    """How many requests with limits have been judged so far, by class."""
    server.settle()
    return {name: row["judged"] for name, row in server.status()["windows"]["1h"].items()}


@pytest.mark.parametrize("path", [*ENDPOINTS, *ONLY_CHECKED])
def test_every_bad_limit_gets_400_by_name_and_the_next_request_is_served(server: Server, path: str) -> None:
    good = ENDPOINTS.get(path) or ONLY_CHECKED[path]
    streams = [False, True] if path in ENDPOINTS and path not in NOT_STREAMING else [False]
    for name, body, headers, field in BAD:
        if name == "list for a single request" and path in BATCHES:
            continue
        for stream in streams:
            text = json.dumps({**good, "stream": stream} if path in ENDPOINTS and streams[1:] else good)
            text = text if body is None else f'{text[:-1]}, "slo": {body}}}'
            response = server.post(path, text, headers)
            assert response.status_code == 400, f"{name}, stream {stream}: {response.text}"
            error = response.json()["error"]
            assert field in (error if isinstance(error, str) else error["message"]), f"{name}: {error}"
            assert len(response.content) < 3000, name
    if path in ENDPOINTS:
        assert server.post(path, good).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_good_limit_arrives_however_it_is_said(server: Server, stream: bool) -> None:
    server.generate(slo={"class": "chat"})
    server.generate(slo={"ttft_ms": 60000})
    before = judged(server)
    for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
        request = ENDPOINTS[path]
        for _, headers, native, openai in WAYS:
            body = {**request, "stream": stream, **(native if path == "/generate" else openai)}
            response = server.post(path, body, headers)
            assert response.status_code == 200, response.text
            assert not stream or response.text.rstrip().endswith("data: [DONE]")
    after = judged(server)
    assert {name: after[name] - before[name] for name in ("chat", "custom")} == {"chat": 6, "custom": 6}


def test_each_item_of_a_batch_is_judged_by_its_own_limit(server: Server) -> None:
    answers = server.generate(["one", "two", "three"], slo=[{"class": "chat"}, None, {"ttft_ms": 60000}])
    verdicts = [answer["meta_info"].get("slo") for answer in answers]
    assert verdicts[0]["class"] == "chat" and verdicts[0]["ttft_limit_ms"] == 60000
    assert verdicts[2]["class"] == "custom" and verdicts[2]["ttft_limit_ms"] == 60000
    assert verdicts[1]["ttft_limit_ms"] is None and verdicts[1]["tbt_limit_ms"] is None
    ids = server.post("/generate", {"input_ids": [[5, 6], [7]], "slo": {"class": "chat"}}).json()
    assert [answer["meta_info"]["slo"]["class"] for answer in ids] == ["chat", "chat"]


def test_an_answer_says_whether_its_limits_were_kept(server: Server) -> None:
    verdict = server.generate(slo={"class": "chat"})["meta_info"]["slo"]
    assert verdict["attained"] is True and verdict["class"] == "chat"


def test_limits_arrive_on_every_generating_endpoint(server: Server) -> None:
    server.generate(slo={"class": "chat"})
    for path, request in ENDPOINTS.items():
        for stream in [False] if path in NOT_STREAMING else [False, True]:
            more = {} if path in NOT_STREAMING else {"stream": stream}
            before = judged(server)["chat"]
            ways: list[tuple[dict[str, Any], dict[str, str]]] = [
                ({"slo": {"class": "chat"}}, {}),
                ({"custom_params": {"slo": {"class": "chat"}}}, {}),
                ({}, {"x-slo-class": "chat"}),
            ]
            for body, headers in ways:
                response = server.post(path, {**request, **more, **body}, headers)
                assert response.status_code == 200, f"{path}: {response.text}"
            assert judged(server)["chat"] == before + 3, f"{path}, stream {stream}"


def test_each_prompt_of_openais_batch_has_its_own_limit(server: Server) -> None:
    server.generate(slo={"class": "chat"})
    before = judged(server)["chat"]
    body = {**ENDPOINTS["/v1/completions"], "prompt": ["one", "two"], "slo": [{"class": "chat"}, None]}
    assert server.post("/v1/completions", body).status_code == 200
    assert judged(server)["chat"] == before + 1


FORGED = {"ttft_ms": 500, "tbt_ms": 50, "class": "vip", "received_s": 0, "resolved": True}


@pytest.mark.parametrize(
    "wrong", [{}, {"ttft_ms": "x"}, {"class": ["a"]}, {"ttft_ms": 0}, {"received_s": "x"}]
)
def test_what_only_the_server_may_say_is_refused_from_a_client(server: Server, wrong: dict[str, Any]) -> None:
    forged = {"custom_params": {"slo": {**FORGED, **wrong}}}
    vertex = {
        "instances": [{"text": "a"}],
        "parameters": {"sampling_params": {"max_new_tokens": 2, **forged}},
    }
    for path, body in [("/vertex_generate", vertex), ("/invocations", {**CHAT, **forged})]:
        response = server.post(path, body)
        assert response.status_code == 400 and "custom_params.slo" in response.text, response.text
    assert server.status()["replicas"][0]["fallbacks"]["count"] == 0


DEADLY: list[tuple[dict[str, Any], str]] = [  # most of them end SGLang's scheduler or detokenizer
    ({"input_ids": [5, 10**6]}, "input_ids"),
    ({"sampling_params": {"skip_special_tokens": 9223372036854775807}}, "skip_special_tokens"),
    ({"sampling_params": {"max_new_tokens": 2.5}}, "max_new_tokens"),
    ({"sampling_params": {"min_new_tokens": 2, "stop_token_ids": [10**6]}}, "stop_token_ids"),
    ({"input_ids": [-1]}, "input_ids"),
    ({"sampling_params": {"repetition_penalty": 1e-45}}, "repetition_penalty"),
    ({"sampling_params": {"logit_bias": {"5": 3e38}, "temperature": 1e-5}}, "logit_bias"),
    ({"return_logprob": True, "top_logprobs_num": 10**6}, "top_logprobs_num"),
    ({"return_logprob": True, "token_ids_logprob": [10**6]}, "token_ids_logprob"),
    ({"return_logprob": True, "logprob_start_len": -7}, "logprob_start_len"),
    ({"sampling_params": {"stream_interval": -1}}, "stream_interval"),
    ({"sampling_params": {"temperature": "hot"}}, "sampling_params"),
    ({"sampling_params": {"n": 10**9}}, "n:"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_inputs_that_would_end_the_server_are_refused_by_name(server: Server, stream: bool) -> None:
    for fields, field in DEADLY:
        prompt = {} if "input_ids" in fields else {"text": "a"}
        response = server.post("/generate", {**prompt, **fields, "stream": stream})
        assert field in response.text, response.text
        # the one that SGLang itself refuses it tells a stream as its first event
        assert response.status_code == 400 or (stream and field == "token_ids_logprob"), response.text
        assert server.generate()["text"] is not None


def test_a_server_says_how_many_came_without_limits(server: Server) -> None:
    def counted() -> dict[str, int]:
        return server.status()["requests"]["/generate"]

    server.generate()
    before = counted()
    server.generate()
    server.generate(slo={"class": "chat"})
    after = counted()
    assert {key: after[key] - before[key] for key in after} == {"with_limits": 1, "without_limits": 1}


def test_other_endpoints_are_left_alone(server: Server) -> None:
    bad = {"x-slo-ttft-ms": "nonsense"}
    assert server.post("/v1/tokenize", {"model": "m", "prompt": "hello"}, bad).status_code == 200
