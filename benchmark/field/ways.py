"""What limit arrives by which way, through SGLang's router and LiteLLM's proxy: a table, measured.

    scripts/run.sh -- benchmark/field/ways.py --write docs/routers.md

Starts our server with the demo model, and in front of it `sglang-router` and LiteLLM's proxy as they come and as they
can be set up; sends one request for each way of saying a limit, each endpoint and each front, one at a time, and reads
in the server's request log which limit it came with.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from child_process import free_port
from field.tools import program_of, python_of, running, version_of
from servers import end_cleanly, server

KEY = "sk-0123456789abcdef0123456789abcdef"  # LiteLLM does not start without
TTFT_MS = 123456  # said in numbers; what says a class says CLASS
CLASS = "chat"
SETTINGS = f"""classes:
  {CLASS}: {{ttft_ms: 60000, tbt_ms: 60000}}
service_tiers: {{priority: {CLASS}}}
"""
MESSAGES = [{"role": "user", "content": "Hello"}]
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/generate": {"text": "Hello", "sampling_params": {"max_new_tokens": 2}},
    "/v1/completions": {"model": "demo", "prompt": "Hello", "max_tokens": 2},
    "/v1/chat/completions": {"model": "demo", "messages": MESSAGES, "max_tokens": 2},
    "/v1/messages": {"model": "demo", "messages": MESSAGES, "max_tokens": 2},
    "/v1/responses": {"model": "demo", "input": "Hello", "max_output_tokens": 16},
}
NUMBERS = {"ttft_ms": TTFT_MS}
WAYS: dict[str, dict[str, Any]] = {  # each: fields of the body, or `headers`
    "body `slo`": {"slo": NUMBERS},
    "body `custom_params.slo`": {"custom_params": {"slo": NUMBERS}},
    "body `metadata.slo_*`": {"metadata": {"slo_ttft_ms": str(TTFT_MS)}},
    "body `custom_labels.slo_*`": {"custom_labels": {"slo_ttft_ms": str(TTFT_MS)}},
    "body `service_tier`": {"service_tier": "priority"},
    "header `x-slo-*`": {"headers": {"x-slo-ttft-ms": str(TTFT_MS)}},
    "header `x-sgl-slo-*`": {"headers": {"x-sgl-slo-ttft-ms": str(TTFT_MS)}},
    "header `x-llm-d-slo-*`": {"headers": {"x-llm-d-slo-ttft-ms": str(TTFT_MS)}},
    "header `tracestate`": {"headers": {"tracestate": f"slo=ttft:{TTFT_MS}"}},
    "header `x-llm-d-inference-objective`": {"headers": {"x-llm-d-inference-objective": CLASS}},
    "header `x-gateway-inference-objective`": {"headers": {"x-gateway-inference-objective": CLASS}},
    "body `extra_headers` (LiteLLM's own)": {"extra_headers": {"x-slo-ttft-ms": str(TTFT_MS)}},
    "body `extra_body.slo` (LiteLLM's own)": {"extra_body": {"slo": NUMBERS}},
}
LITELLMS = "LiteLLM's own"
ARRIVES, LOST, ABSENT = "yes", "lost", "–"


@dataclass
class Log:
    """The server's request log, read as it grows."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def newest(self, patience_s: float = 5.0) -> dict[str, Any] | None:
        """The row of a request that has just been answered; None: nothing came."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            if len(lines) > len(self.rows):
                self.rows = [json.loads(line) for line in lines]
                return self.rows[-1]
            time.sleep(0.05)
        return None


def asked(url: str, path: str, way: dict[str, Any], log: Log) -> str:
    """One request: ARRIVES, LOST, or the status with which it was refused on its way."""
    body, headers = {**ENDPOINTS[path]}, dict(way.get("headers", {}))
    extra = {k: v for k, v in way.items() if k != "headers"}
    if path == "/generate" and "custom_params" in extra:  # there it is a sampling parameter
        body["sampling_params"] = {**body["sampling_params"], "custom_params": extra.pop("custom_params")}
    headers |= {"authorization": f"Bearer {KEY}", "anthropic-version": "2023-06-01"}
    response = requests.post(url + path, json={**body, **extra}, headers=headers, timeout=60)
    if response.status_code in (404, 405):
        return ABSENT
    if response.status_code != 200:
        return f"HTTP {response.status_code}"
    row = log.newest()
    if row is None:
        return "no request"
    numbers = row["ttft_limit_s"] == TTFT_MS / 1e3
    return ARRIVES if numbers or row["class"] == CLASS else LOST


@contextmanager
def router(worker: str, log: Path) -> Iterator[str]:
    """SGLang's router in front of `worker`; its URL."""
    port = free_port()
    command = [str(python_of("router")), "-m", "sglang_router.launch_router", "--worker-urls", worker]
    command += ["--port", str(port), "--host", "127.0.0.1", "--policy", "round_robin"]
    command += ["--prometheus-port", str(free_port())]
    url = f"http://127.0.0.1:{port}"
    with running(command, url + "/health", log):
        yield url


@contextmanager
def litellm(worker: str, log: Path, forward: bool) -> Iterator[str]:
    """LiteLLM's proxy in front of `worker`, which it is told is an OpenAI server; its URL."""
    port, config = free_port(), log.with_suffix(".yaml")
    model = {"model": "openai/demo", "api_base": worker + "/v1", "api_key": "none"}
    settings: dict[str, Any] = {"model_list": [{"model_name": "demo", "litellm_params": model}]}
    if forward:
        settings["general_settings"] = {"forward_client_headers_to_llm_api": True}
    config.write_text(json.dumps(settings))
    command = [*program_of("litellm"), "--config", str(config), "--port", str(port), "--host", "127.0.0.1"]
    url = f"http://127.0.0.1:{port}"
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": KEY}
    with running(command, url + "/health/liveliness", log, env):
        yield url


def measure(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Front to way to endpoint to what became of the limit."""
    config = folder / "slo.yaml"
    config.write_text(SETTINGS)
    log = Log(folder / "requests.jsonl")
    flags = ["--slo-config", str(config), "--slo-request-log", str(log.path), "--sleep-on-idle"]
    flags += ["--served-model-name", "demo"]
    with ExitStack() as stack:
        url = stack.enter_context(server("slo", flags, folder / "server.log"))
        fronts = {"no front": url}
        fronts["sglang-router"] = stack.enter_context(router(url, folder / "router.log"))
        for name, forward in (("LiteLLM", False), ("LiteLLM, headers forwarded", True)):
            fronts[name] = stack.enter_context(litellm(url, folder / f"{name[7:] or 'litellm'}.log", forward))
        log.newest(1.0)
        return {front: _of_front(front, at, log) for front, at in fronts.items()}


def _of_front(front: str, url: str, log: Log) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name, way in WAYS.items():
        if LITELLMS in name and not front.startswith("LiteLLM"):
            continue
        found[name] = {path: asked(url, path, way, log) for path in ENDPOINTS}
        print(front, name, found[name], file=sys.stderr, flush=True)
    return found


def tables(found: dict[str, dict[str, dict[str, str]]]) -> str:
    """One Markdown table a front."""
    lines = []
    for front, ways in found.items():
        lines += [f"### {front}", "", "| | " + " | ".join(f"`{p}`" for p in ENDPOINTS) + " |"]
        lines.append("|---|" + "---|" * len(ENDPOINTS))
        for name, by_path in ways.items():
            lines.append(f"| {name} | " + " | ".join(by_path[path] for path in ENDPOINTS) + " |")
        lines.append("")
    return "\n".join(lines)


def page(found: dict[str, dict[str, dict[str, str]]]) -> str:
    """The page of the docs."""
    text = (Path(__file__).with_name("routers.in.md")).read_text()
    tools = ", ".join([version_of("router", "sglang-router"), version_of("litellm")])
    day = time.strftime("%Y-%m-%d")
    said = f"{day}, {tools}, in front of the real server with the demo model on a CPU ({platform.machine()})"
    return text.replace("{{when}}", said).replace("{{tables}}", tables(found).strip())


def _told(found: dict[str, dict[str, dict[str, str]]], file: Path | None) -> int:
    print(tables(found))
    if file:
        file.write_text(page(found))
    return 0


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="write the page of the docs here")
    parser.add_argument("--out", type=Path, default=Path("out/ways"), help="folder for logs")
    parser.add_argument("--found", type=Path, help="ways.json of an earlier run, instead of a new one")
    args = parser.parse_args()
    if args.found:
        return _told(json.loads(args.found.read_text()), args.write)
    end_cleanly()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "requests.jsonl").unlink(missing_ok=True)
    found = measure(args.out.resolve())
    (args.out / "ways.json").write_text(json.dumps(found, indent=1))
    return _told(found, args.write)


if __name__ == "__main__":
    sys.exit(main())
