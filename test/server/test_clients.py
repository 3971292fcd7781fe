"""Ordinary clients, unmodified: SGLang's benchmark, OpenAI's client, frontend programs, one that leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import sglang as sgl

from conftest import Server
from sglang_slo import lang
from sglang_slo.cpu.demo_model import demo_model_path
from sglang_slo.server.limits import LimitError

pytestmark = pytest.mark.server

CHAT = {"class": "chat"}


@pytest.mark.parametrize(
    ("backend", "flags"),
    [
        ("sglang", []),
        ("sglang-oai-chat", []),
        ("sglang", ["--header", "x-slo-class=chat"]),
        ("sglang-oai-chat", ["--extra-request-body", json.dumps({"slo": CHAT})]),
    ],
    ids=["native", "chat", "native with a header", "chat with a body"],
)
def test_sglangs_benchmark_completes(server: Server, backend: str, flags: list[str], tmp_path: Path) -> None:
    result = tmp_path / "result.jsonl"
    shape = "--dataset-name random-ids --random-input-len 64 --random-output-len 16 --random-range-ratio 0.5"
    command = (
        f"-m sglang.bench_serving --backend {backend} {shape} --num-prompts 200 --request-rate 20 --seed 1"
    )
    command += f" --base-url {server.url} --model {demo_model_path()} --output-file {result} --disable-tqdm"
    done = subprocess.run([sys.executable, *command.split(), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(result.read_text())["completed"] == 200
    assert server.status()["replicas"][0]["fallbacks"]["count"] == 0


@pytest.mark.parametrize(
    "extra",
    [{}, {"extra_headers": {"x-slo-class": "chat"}}, {"extra_body": {"slo": CHAT}}],
    ids=lambda e: str(e),
)
def test_openais_client_streams(server: Server, extra: dict[str, Any]) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    messages: Any = [{"role": "user", "content": "hello"}]
    options: Any = {"model": "m", "max_tokens": 8, "temperature": 0, **extra}
    pieces = list(client.chat.completions.create(messages=messages, stream=True, **options))
    whole = client.chat.completions.create(messages=messages, **options)
    assert (
        "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
        == whole.choices[0].message.content
    )
    assert client.completions.create(prompt="hello", **options).choices[0].text


def test_openais_client_is_told_what_is_wrong(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="x-slo-ttft-ms"):
        client.completions.create(model="m", prompt="a", extra_headers={"x-slo-ttft-ms": "soon"})


@sgl.function
def program(s: Any, question: str, gen: Callable[..., Any] = sgl.gen, **limits: Any) -> None:
    """Every way the frontend language has of asking the server."""
    s += "Q: " + question + "\nA: " + gen("answer", max_tokens=8, **limits)
    s += " so: " + sgl.select("choice", ["yes", "no"])
    forks = s.fork(2)
    for i, fork in enumerate(forks):
        fork += f" part {i}: " + sgl.gen("part", max_tokens=4)
    forks.join()
    s += forks[0]["part"] + forks[1]["part"] + sgl.gen("end", max_tokens=4, dtype=int)


@pytest.mark.parametrize("slo", [None, CHAT, {"ttft_ms": 60000, "tbt_ms": 60000}])
def test_a_frontend_program_runs(server: Server, slo: Any) -> None:
    backend = lang.RuntimeEndpoint(server.url, slo=slo)
    server.settle()
    finished = server.status()["replicas"][0]["totals"]["finished"]
    questions = [{"question": f"number {i}?"} for i in range(4)]
    states = program.run_batch(questions, backend=backend, temperature=0, num_threads=4)
    for state in states:
        assert state["choice"] in ("yes", "no") and state["answer"] and state.get_meta_info("end")
    server.settle()
    assert server.status()["replicas"][0]["totals"]["finished"] >= finished + 4 * 5
    if slo is not None:
        assert states[0].get_meta_info("answer")["slo"]["class"] == slo.get("class", "custom")


def test_the_narrower_limit_wins_in_a_program(server: Server) -> None:
    backend = lang.RuntimeEndpoint(server.url, slo=CHAT)
    assert program.run("a", backend=backend).get_meta_info("answer")["slo"]["class"] == "chat"
    run = program.run("b", backend=backend.with_slo({"ttft_ms": 50000}))
    assert run.get_meta_info("answer")["slo"]["class"] == "custom"
    call = program.run("c", lang.gen, slo={"ttft_ms": 40000}, backend=backend)
    assert call.get_meta_info("answer")["slo"]["class"] == "custom"
    assert call.get_meta_info("end")["slo"]["class"] == "chat"
    stream = program.run("d", lang.gen, slo={"ttft_ms": 40000}, backend=backend, stream=True)
    assert "".join(stream.text_iter()).startswith("Q: d")


def test_a_programs_bad_limit_is_refused_at_once(server: Server) -> None:
    with pytest.raises(LimitError, match=r"slo\.ttft"):
        lang.RuntimeEndpoint(server.url, slo={"ttft": 5})
    with pytest.raises(LimitError, match=r"slo\.tbt_ms"):
        lang.gen("x", slo={"tbt_ms": 0})
    with pytest.raises(ValueError, match="choices"):
        lang.gen("x", choices=["a"], slo=CHAT)


def test_a_client_that_leaves_gives_its_memory_back(server: Server) -> None:
    server.settle()
    before = server.status()["replicas"][0]["now"]["kv"]
    body = {"text": "hello", "stream": True, "slo": CHAT}
    body["sampling_params"] = {"max_new_tokens": 10000, "ignore_eos": True}
    with requests.post(server.url + "/generate", json=body, stream=True, timeout=60) as response:
        assert next(response.iter_lines())
    server.settle()
    now = server.status()["replicas"][0]["now"]
    after = now["kv"]
    assert now["running"] == 0 and after["free"] + after["evictable"] == before["free"] + before["evictable"]
    assert server.generate(slo=CHAT)["text"]
