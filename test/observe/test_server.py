"""A real server says of each request whether its promise was kept: to its client and to operators."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from conftest import PATIENCE_S, Server
from sglang_slo.estimator import data

pytestmark = pytest.mark.server

PARAMS = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def log(server: Server) -> Path:
    return server.request_log


@pytest.fixture
def url(server: Server) -> str:
    return server.url


def generate(url: str, slo_class: str | None, **body: Any) -> Any:
    headers = {"x-slo-class": slo_class} if slo_class else {}
    answer = requests.post(
        url + "/generate", json={"sampling_params": PARAMS, **body}, headers=headers, timeout=120
    )
    answer.raise_for_status()
    return answer.json()


def status(url: str) -> dict[str, Any]:
    time.sleep(0.6)  # the answer is kept for half a second
    found: dict[str, Any] = requests.get(url + "/slo/status", timeout=20).json()
    return found


def test_answer_carries_its_verdict_and_an_untouched_finish_reason(url: str) -> None:
    easy = generate(url, "easy", text="hello")["meta_info"]
    hopeless = generate(url, "hopeless", text="hello")["meta_info"]
    assert (easy["slo"]["class"], easy["slo"]["attained"], easy["slo"]["missed"]) == ("easy", True, [])
    assert (hopeless["slo"]["attained"], hopeless["slo"]["missed"]) == (False, ["ttft", "gap"])
    assert hopeless["slo"]["unattainable"]
    assert easy["slo"]["ttft_ms"] > 0 and easy["slo"]["longest_pause_ms"] >= easy["slo"]["tpot_ms"] > 0
    assert easy["finish_reason"] == {"type": "length", "length": 12}


def test_each_of_a_batch_has_its_own_verdict(url: str) -> None:
    answers = generate(url, "easy", text=["one", "two and more"])
    assert [a["meta_info"]["slo"]["attained"] for a in answers] == [True, True]


def test_streamed_answer_has_its_verdict_in_the_last_chunk_only(url: str) -> None:
    answer = requests.post(
        url + "/generate",
        json={"text": "hello", "sampling_params": PARAMS, "stream": True},
        headers={"x-slo-class": "easy"},
        stream=True,
        timeout=120,
    )
    chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith(b"data: {")]
    assert len(chunks) > 2
    assert ["slo" in chunk["meta_info"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_best_effort_request_is_told_that_nothing_was_promised(url: str) -> None:
    told = generate(url, None, text="hello")["meta_info"]["slo"]
    assert (told["attained"], told["ttft_limit_ms"], told["tbt_limit_ms"]) == (True, None, None)


def test_status_counts_what_clients_were_told(url: str) -> None:
    before = status(url)["windows"]["1h"].get("easy", {"attained": 0, "judged": 0})
    told = [generate(url, "easy", text="hello")["meta_info"]["slo"]["attained"] for _ in range(3)]
    after = status(url)
    assert after["policy"] == "slo"
    assert after["windows"]["1h"]["easy"]["judged"] - before["judged"] == 3
    assert after["windows"]["1h"]["easy"]["attained"] - before["attained"] == sum(told)
    (replica,) = after["replicas"]
    assert replica["observer_errors"] == 0
    assert replica["now"]["kv"]["capacity"] >= replica["now"]["kv"]["free"] > 0
    assert replica["fallbacks"] == {"count": 0, "last": None}


def test_client_that_leaves_is_counted_and_nothing_stays_running(url: str, server: Server) -> None:
    server.settle()
    before = status(url)["replicas"][0]["totals"]
    body = {"text": "hello", "stream": True, "sampling_params": {**PARAMS, "max_new_tokens": 10_000}}
    headers = {"x-slo-class": "easy"}
    with requests.post(
        url + "/generate", json=body, headers=headers, stream=True, timeout=PATIENCE_S
    ) as response:
        assert next(response.iter_lines())  # it runs, and would for long
    server.settle()
    replica = status(url)["replicas"][0]
    assert replica["totals"]["finished"] == before["finished"] + 1
    assert replica["totals"].get("left_in_time", 0) == before.get("left_in_time", 0) + 1
    assert replica["now"]["running"] == 0


def test_metrics_stand_beside_sglangs_own(url: str) -> None:
    generate(url, "easy", text="hello")
    lines = requests.get(url + "/metrics", timeout=20).text.splitlines()
    ours = [line for line in lines if line.startswith("sglang_slo_attained_requests_total{")]
    assert any('slo_class="easy"' in line and 'tp_rank="0"' in line for line in ours)
    assert any(line.startswith("sglang:num_running_reqs{") for line in lines)
    assert any(line.startswith("sglang_slo_headroom_tokens_per_second{") for line in lines)


def test_loads_tell_headroom_by_class_beside_sglangs_own(url: str) -> None:
    (load,) = requests.get(url + "/v1/loads", timeout=20).json()["loads"]
    assert {"num_running_reqs", "num_waiting_reqs"} <= load.keys()
    assert load["slo"]["backlog_tokens"] == 0 and load["slo"]["headroom"]["easy"]["tokens_per_s"] > 0
    plain = requests.get(url + "/v1/loads?format=prometheus", timeout=20)
    assert plain.headers["content-type"].startswith("text/plain") and "sglang" in plain.text


def test_page_is_served(url: str) -> None:
    assert "<title>sglang-slo</title>" in requests.get(url + "/slo", timeout=20).text


def test_log_has_a_row_for_each_finished_request_and_no_prompt(url: str, log: Path, server: Server) -> None:
    generate(url, "easy", text="a prompt to be kept private")
    server.settle()
    finished = status(url)["replicas"][0]["totals"]["finished"]
    for _ in range(PATIENCE_S * 5):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        if len(rows) == finished:
            break
        time.sleep(0.2)
    assert len(rows) == finished
    assert all(
        {"features", "output_tokens", "prompt_tokens", "class", "attained"} <= row.keys() for row in rows
    )
    assert "private" not in log.read_text()
    assert rows[-1]["features"]["declared_max"] > 0
    assert len(data.read(log).lengths_tokens) == finished  # a length model can be trained from it
