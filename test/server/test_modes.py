"""SGLang's own features under our scheduler: each works as the table in runtime/scheduler/modes.py says."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from conftest import PATIENCE_S, Server
from sglang_slo.cpu.demo_model import demo_model_path

pytestmark = pytest.mark.server

CHAT = {"class": "chat"}


def test_a_lora_adapter_changes_the_answer_of_its_own_requests_only(server: Server) -> None:
    plain, other = server.generate(slo=CHAT), server.generate(slo=CHAT, lora_path="other")
    both = server.generate(["hello", "hello"], lora_path=[None, "other"], slo=CHAT)
    assert plain["text"] != other["text"]
    assert [answer["text"] for answer in both] == [plain["text"], other["text"]]


def test_a_grammar_is_kept(server: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    params = {"json_schema": json.dumps(schema)}
    assert isinstance(json.loads(server.generate(tokens=64, slo=CHAT, params=params)["text"])["a"], bool)
    assert server.generate(slo=CHAT, params={"regex": "(yes|no)"})["text"] in ("yes", "no")


def test_logprobs_are_told(server: Server) -> None:
    answer = server.generate(tokens=3, slo=CHAT, return_logprob=True, top_logprobs_num=2, logprob_start_len=0)
    info = answer["meta_info"]
    assert len(info["output_token_logprobs"]) == 3 and len(info["input_token_logprobs"]) == 4
    assert info["output_top_logprobs"][0][0][1] == answer["output_ids"][0]


def test_a_session_goes_on_where_it_stopped(server: Server) -> None:
    session = server.post("/open_session", {"capacity_of_str_len": 1000}).json()
    first = server.generate("hello", slo=CHAT, session_params={"id": session})
    rid = first["meta_info"]["id"]
    second = server.generate(" you", slo=CHAT, session_params={"id": session, "rid": rid})
    assert second["meta_info"]["prompt_tokens"] > first["meta_info"]["prompt_tokens"] + 8
    assert server.post("/close_session", {"session_id": session}).status_code == 200


def test_a_chat_of_several_turns_finds_its_prefix_again(server: Server) -> None:
    messages = [{"role": "user", "content": "one two three four"}]
    for turn in range(3):
        body = {"model": "m", "messages": messages, "max_tokens": 8, "temperature": 0, "slo": CHAT}
        answer = server.post("/v1/chat/completions", body).json()
        messages.append(answer["choices"][0]["message"])
        messages.append({"role": "user", "content": f"and {turn}?"})
    messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    text = "".join(f"<|{m['role']}|>{m['content']}\n" for m in messages)
    assert server.generate(text, slo=CHAT)["meta_info"]["cached_tokens"] > 20


def long_request(server: Server, answers: list[Any], rid: str) -> threading.Thread:
    """A request that would run for long, in a thread; its answer is appended to `answers`."""
    body = {"text": "hello", "rid": rid, "slo": CHAT}
    body["sampling_params"] = {"max_new_tokens": 4000, "ignore_eos": True}
    thread = threading.Thread(target=lambda: answers.append(server.post("/generate", body)))
    thread.start()
    wait_for(lambda: server.status()["replicas"][0]["now"]["running"] >= 1)
    return thread


def wait_for(happened: Any) -> None:
    """Until `happened()`."""
    for _ in range(PATIENCE_S * 10):
        if happened():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def test_an_abort_ends_its_request_and_nothing_else(server: Server) -> None:
    answers: list[Any] = []
    thread = long_request(server, answers, "to-abort")
    assert server.generate(slo=CHAT)["meta_info"]["completion_tokens"] == 8
    server.post("/abort_request", {"rid": "to-abort"})
    thread.join(PATIENCE_S)
    assert answers[0].json()["meta_info"]["finish_reason"]["type"] == "abort"


def test_generation_can_be_paused_and_goes_on(server: Server) -> None:
    whole = server.generate("pause", tokens=64, params={"ignore_eos": True})["text"]
    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(server.generate("pause", 64, slo=CHAT, params={"ignore_eos": True}))
    )
    thread.start()
    server.post("/pause_generation", {"mode": "in_place"})
    server.post("/continue_generation")
    thread.join(PATIENCE_S)
    assert answers[0]["text"] == whole


def test_the_cache_can_be_flushed(server: Server) -> None:
    server.generate("a prompt to be kept", slo=CHAT)
    assert server.generate("a prompt to be kept")["meta_info"]["cached_tokens"] > 0
    server.settle()  # SGLang flushes only when nothing is on its way
    assert server.post("/flush_cache").status_code == 200
    assert server.generate("a prompt to be kept")["meta_info"]["cached_tokens"] == 0


def test_weights_can_be_updated(server: Server) -> None:
    before = server.generate("weights", slo=CHAT)["text"]
    server.settle()  # SGLang's scheduler gives up where an iteration is still on its way
    response = server.post("/update_weights_from_disk", {"model_path": str(demo_model_path())})
    assert response.json()["success"], response.text
    assert server.generate("weights", slo=CHAT)["text"] == before


def test_a_request_longer_than_the_pool_gets_a_clear_answer(server: Server) -> None:
    ids = [7] * 20000
    response = server.post(
        "/generate", {"input_ids": ids, "slo": CHAT, "sampling_params": {"max_new_tokens": 2}}
    )
    assert response.status_code == 400 and "longer than" in response.text
    assert server.generate(slo=CHAT)["text"]


def test_prometheus_tells_both_sglangs_figures_and_ours(server: Server) -> None:
    import requests

    server.generate(slo=CHAT)
    text = requests.get(server.url + "/metrics", timeout=30).text
    assert "sglang:" in text and "sglang_slo_" in text
