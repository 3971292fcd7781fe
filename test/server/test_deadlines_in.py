"""Deadlines over HTTP: good ones arrive at the scheduler, bad ones get 400 and harm nobody."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bad_limits import BAD
from conftest import Server

pytestmark = pytest.mark.server

ENDPOINTS = {
    "/generate": {"text": "hello", "sampling_params": {"max_new_tokens": 2}},
    "/v1/completions": {"model": "m", "prompt": "hello", "max_tokens": 2},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
}


# Four ways to say a limit: headers, and fields of the body for /generate and for OpenAI's endpoints.
WAYS: list[tuple[str, dict[str, str], dict[str, Any], dict[str, Any]]] = [
    ("default", {"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "60000"}, {}, {}),
    ("chat", {"x-slo-class": "chat"}, {}, {}),
    ("default", {}, {"slo": {"ttft_ms": 60000}}, {"slo": {"ttft_ms": 60000}}),
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


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_bad_limit_gets_400_by_name_and_the_next_request_is_served(server: Server, path: str) -> None:
    good = ENDPOINTS[path]
    for name, body, headers, field in BAD:
        text = json.dumps(good) if body is None else json.dumps(good)[:-1] + f', "slo": {body}}}'
        for stream in ("", '"stream": true, '):
            response = server.post(path, "{" + stream + text[1:], headers)
            assert response.status_code == 400, f"{name}: {response.text}"
            assert field in response.json()["error"]["message"], name
        assert server.post(path, good).status_code == 200, name


@pytest.mark.parametrize("stream", [False, True])
def test_a_good_limit_arrives_however_it_is_said(server: Server, stream: bool) -> None:
    server.generate(slo={"class": "chat"})
    server.generate(slo={"ttft_ms": 60000})
    before = judged(server)
    for path, request in ENDPOINTS.items():
        for _, headers, native, openai in WAYS:
            body = {**request, "stream": stream, **(native if path == "/generate" else openai)}
            response = server.post(path, body, headers)
            assert response.status_code == 200, response.text
            assert not stream or response.text.rstrip().endswith("data: [DONE]")
    after = judged(server)
    assert {name: after[name] - before[name] for name in ("chat", "default")} == {"chat": 6, "default": 6}


def test_each_item_of_a_batch_is_judged_by_its_own_limit(server: Server) -> None:
    answers = server.generate(["one", "two", "three"], slo=[{"class": "chat"}, None, {"ttft_ms": 60000}])
    verdicts = [answer["meta_info"].get("slo") for answer in answers]
    assert verdicts[0]["class"] == "chat" and verdicts[0]["ttft_limit_ms"] == 60000
    assert verdicts[2]["class"] == "default" and verdicts[2]["ttft_limit_ms"] == 60000
    assert verdicts[1]["ttft_limit_ms"] is None and verdicts[1]["tbt_limit_ms"] is None
    ids = server.post("/generate", {"input_ids": [[5, 6], [7]], "slo": {"class": "chat"}}).json()
    assert [answer["meta_info"]["slo"]["class"] for answer in ids] == ["chat", "chat"]


def test_an_answer_says_whether_its_limits_were_kept(server: Server) -> None:
    verdict = server.generate(slo={"class": "chat"})["meta_info"]["slo"]
    assert verdict["attained"] is True and verdict["class"] == "chat"


def test_other_endpoints_are_left_alone(server: Server) -> None:
    bad = {"x-slo-ttft-ms": "nonsense"}
    assert server.post("/v1/tokenize", {"model": "m", "prompt": "hello"}, bad).status_code == 200
