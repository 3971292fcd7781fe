"""Verdicts reach the clients of every API that has room for one; streams tell theirs to those who ask."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from conftest import Server
from sglang_slo.cpu.demo_model import demo_model_path

pytestmark = pytest.mark.server

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "m", "messages": MESSAGES, "max_tokens": 4}
RESPONSE: dict[str, Any] = {
    "model": str(demo_model_path()),
    "input": "hi",
    "max_output_tokens": 4,
    "store": False,
}
EASY, HOPELESS = {"class": "easy"}, {"class": "hopeless"}


def events(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The JSON events of a stream, in order."""
    response = server.post(path, {**body, "stream": True})
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"model": "m", "prompt": "hi", "max_tokens": 4}),
        ("/v1/messages", CHAT),
        ("/v1/responses", RESPONSE),
    ],
)
def test_an_answer_that_comes_whole_says_whether_its_limits_were_kept(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    for limits, attained in ((EASY, True), (HOPELESS, False)):
        told = server.post(path, {**body, "slo": limits}).json()["metadata"]["slo"]
        told = json.loads(told) if path == "/v1/responses" else told
        assert (told["class"], told["attained"]) == (limits["class"], attained)


def test_each_choice_has_its_verdict(server: Server) -> None:
    told = server.post("/v1/chat/completions", {**CHAT, "n": 2, "slo": EASY}).json()["metadata"]["slo"]
    assert [one["class"] for one in told] == ["easy", "easy"]


@pytest.mark.parametrize("asked", [True, False])
def test_a_streams_last_event_has_the_verdict_if_that_was_asked_for(server: Server, asked: bool) -> None:
    ask = {"verdict": True} if asked else {}
    chunks = events(server, "/v1/chat/completions", {**CHAT, "slo": {**EASY, **ask}})
    assert [(c.get("metadata") or {}).get("slo", {}).get("class") for c in chunks[-2:]] == [
        None,
        "easy" if asked else None,
    ]
    messages = events(server, "/v1/messages", {**CHAT, "slo": {**EASY, **ask}})
    assert messages[-1]["type"] == "message_stop"
    assert (messages[-2]["type"] == "slo") == asked and (not asked or messages[-2]["slo"]["attained"])
    response = events(server, "/v1/responses", {**RESPONSE, "slo": EASY})[-1]["response"]
    assert json.loads(response["metadata"]["slo"])["class"] == "easy"  # the whole response: unasked


def test_openais_client_reads_a_stream_with_a_verdict(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    messages: Any = MESSAGES
    stream = client.chat.completions.create(
        model="m", messages=messages, max_tokens=4, stream=True, extra_headers={"x-slo-verdict": "true"}
    )
    *chunks, last = list(stream)
    assert all(chunk.choices for chunk in chunks) and last.choices == []
    assert last.id == chunks[0].id and last.metadata["slo"]["attained"]  # type: ignore[attr-defined]


def test_sglangs_own_figures_of_requests_are_there_beside_ours(server: Server) -> None:
    server.generate()
    text = requests.get(server.url + "/metrics", timeout=60).text
    assert "sglang:time_to_first_token_seconds_count" in text and "sglang:http_requests_total" in text
    assert 'sglang_slo_http_requests_total{endpoint="offline"' not in text  # its own probes are nobody's


def test_requests_are_counted_by_endpoint_with_limits_and_without(server: Server) -> None:
    def counted() -> dict[tuple[str, str], float]:
        text = requests.get(server.url + "/metrics", timeout=60).text
        return {
            (s.labels["endpoint"], s.labels["limits"]): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
            if s.name == "sglang_slo_http_requests_total"
        }

    server.post("/v1/messages", {**CHAT, "slo": EASY})
    server.post("/v1/messages", CHAT)
    before = counted()
    server.post("/v1/messages", {**CHAT, "slo": EASY})
    server.post("/v1/messages", CHAT)
    server.post("/v1/messages", {**CHAT, "slo": {"verdict": True}})  # is no limit
    more = {key: value - before.get(key, 0) for key, value in counted().items()}
    assert more[("/v1/messages", "with")] == 1 and more[("/v1/messages", "without")] == 2
