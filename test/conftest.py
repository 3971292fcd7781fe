"""Real servers for tests: started once, shared, stopped for certain."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import settings

from child_process import Child, free_port
from sglang_slo.core.latency import Coefficients, LatencyModel

# a busy machine is no failure: what a test claims never depends on time
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

ROOT = Path(__file__).resolve().parent.parent
SHARED = "shared server"
START_LIMIT_S = 900
LAUNCH = ("-m", "sglang_slo.launch_server")
STATUS_AGE_S = 1.5  # more than /slo/status is ever behind
PATIENCE_S = 600  # for what must happen sooner or later, on a busy machine too
PROFILE_FLAG = "--slo-profile"
# `chat` and `easy` are kept on any machine, `hopeless` on none
CLASSES = """classes:
  chat: {ttft_ms: 60000, tbt_ms: 60000}
  batch: {}
  easy: {ttft_ms: 600000, tbt_ms: 600000}
  hopeless: {ttft_ms: 0.001, tbt_ms: 0.001}
"""
# Some machine's: no test server has to measure its own, and all plan alike.
PROFILE = LatencyModel(Coefficients(2e-3, 1e-3, 5e-5, 0.0, 2e-3, 1e-8), 1.25, name="test", measured=True)


class Server(Child):
    """A server in a process of its own; `url`, its log, and how to ask it something."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path) -> None:
        self.request_log = log.with_name("requests.jsonl")  # where it was asked for
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        log.unlink(missing_ok=True)
        patient = {"SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": str(PATIENCE_S)}
        super().__init__([*command, "--port", str(self.port)], log, {**patient, **os.environ, **env})

    def post(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> requests.Response:
        """POST `body` as JSON (text: as it is)."""
        data = body if isinstance(body, str) else json.dumps(body or {})
        headers = {"content-type": "application/json", **(headers or {})}
        return requests.post(self.url + path, data=data, headers=headers, timeout=300)

    def generate(self, text: Any = "hello", tokens: int = 8, **fields: Any) -> Any:
        """The answer of /generate, greedy; `params` adds sampling parameters. Raises on anything but 200."""
        params = {"max_new_tokens": tokens, "temperature": 0, **fields.pop("params", {})}
        response = self.post("/generate", {"text": text, "sampling_params": params, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def settle(self) -> None:
        """Until nothing runs and `/slo/status` tells of all that has."""
        seen: Any = None
        for _ in range(int(PATIENCE_S / STATUS_AGE_S)):
            told = [(r["now"]["running"], r["totals"]["finished"]) for r in self.status()["replicas"]]
            if told == seen and not any(running for running, _ in told):
                return
            seen = told
            time.sleep(STATUS_AGE_S)
        raise AssertionError(f"still running: {seen}")

    def status(self) -> Any:
        """What `/slo/status` tells."""
        return requests.get(self.url + "/slo/status", timeout=60).json()


@contextlib.contextmanager
def running(
    folder: Path, *flags: str, python: Sequence[str] = LAUNCH, env: dict[str, str] | None = None
) -> Iterator[Server]:
    """A server started by Python with the arguments `python` and `flags`, ready to answer.

    Ours starts on PROFILE unless told otherwise: measuring takes seconds of each start, and depends on the machine.
    """
    if python == LAUNCH and PROFILE_FLAG not in flags:
        PROFILE.save(folder / "profile.json")
        flags = (*flags, PROFILE_FLAG, str(folder / "profile.json"))
    command = [sys.executable, *python, *flags]
    server = Server(command, env or {}, folder / "server.log")
    try:
        server.answering(server.url + "/health", START_LIMIT_S)
        yield server
    finally:
        server.stop(grace_s=0)


@pytest.fixture(scope="session")
def slo_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings with the classes of CLASSES."""
    file = tmp_path_factory.mktemp("settings") / "slo.yaml"
    file.write_text(CLASSES)
    return file


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA adapter of the demo model."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(1)
    weights = {}
    for layer in range(2):
        for name, width in {"q": 64, "k": 32, "v": 32, "o": 64}.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(4, 64)
            weights[f"{prefix}.lora_B.weight"] = torch.randn(width, 4)
    save_file(weights, folder / "adapter_model.safetensors")
    modules = [f"{name}_proj" for name in "qkvo"]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def server(slo_yaml: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model under our scheduler; shared by all tests that need no flags of their own."""
    folder = tmp_path_factory.mktemp("shared")
    # idle schedulers spin: this one would take a core from the servers that other tests start beside it
    flags = ["--slo-config", str(slo_yaml), "--enable-metrics", "--sleep-on-idle"]
    flags += ["--slo-request-log", str(folder / "requests.jsonl")]
    flags += ["--constrained-json-disable-any-whitespace"]  # the model would fill an answer with it
    flags += ["--enable-lora", "--lora-paths", f"other={lora}", "--lora-backend", "torch_native"]
    with running(folder, *flags) as shared:
        assert shared.status()["policy"] == "slo"
        yield shared


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs of a real scheduler keep the demo model and a profile."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def expected(folder: Path) -> dict[str, list[int]]:
    """SGLang's own tokens for `crowded.requests`, with room for everyone."""
    import real_scheduler as real
    from crowded import COUNT, requests

    roomy = ["--max-total-tokens", "20000"]
    return real.run(real.all_at_once(requests()), COUNT, roomy, folder, False).tokens


def pytest_configure() -> None:
    """Servers are stopped, too, where the tests are told to end: as by the keyboard."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@functools.cache
def _says(file: str) -> tuple[bool, bool]:
    """Whether the tests or fixtures of a file ask for the shared server, and whether each makes all that it needs."""
    text = (ROOT / file).read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    asked = [f for f in functions if f.name.startswith("test_") or f.decorator_list]
    return any(arg.arg == "server" for f in asked for arg in f.args.args), "pytest.mark.alone" in text


def kept_together(nodeid: str) -> str:
    """The name of those tests that one process runs, where several share the tests (`pytest -n 2`).

    Those of the shared server stay together, so that it is started once; other tests stay with their file, whose
    fixtures they share, except where each makes all that it needs.
    """
    file = nodeid.split("::")[0]
    shared, alone = _says(file)
    return SHARED if shared else nodeid if alone else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Shares out what is kept together; xdist's own groups come to nothing under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return kept_together(nodeid)

    return Together(config, log)


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out those that are not of the marks asked for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start servers come first: they are the longest."""
    for item in items:
        if "server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.server)  # so that `-m 'not server'` starts none
            if kept_together(item.nodeid) != SHARED:
                raise pytest.UsageError(f"{item.nodeid}: nothing in this file has the argument `server`")
    items.sort(key=lambda item: item.get_closest_marker("server") is None)
