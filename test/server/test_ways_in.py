"""Our scheduler and deadlines in every way of starting SGLang; nothing of ours where it is not asked for."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Server, running
from sglang_slo.config import ENV, SloConfig
from sglang_slo.core.slo import SloClass
from sglang_slo.cpu.demo_model import demo_model_path
from sglang_slo.runtime.scheduler import plan_log

pytestmark = [pytest.mark.server, pytest.mark.alone]

SMALL = ["--dtype", "float32", "--max-total-tokens", "20000"]
SGLANG_SERVE = ("-c", "from sglang.cli.main import main; main()", "serve")  # as its `sglang` command
SWITCHED_ON = {ENV: SloConfig(classes={"chat": SloClass(60000, 60000)}).to_json()}


def load(server: Server, requests: int = 100) -> list[str]:
    """The answers to a burst of short and long prompts, half of them with limits."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        jobs = [
            pool.submit(
                server.generate,
                f"{i} " + "the " * (i % 7) * 30,
                16,
                slo={"ttft_ms": 60000} if i % 2 else None,
            )
            for i in range(requests)
        ]
        return [job.result()["text"] for job in jobs]


@pytest.mark.parametrize("flags", [["--tp", "2"], ["--dp", "2"]], ids=["tp 2", "dp 2"])
def test_ranks_and_replicas_serve_a_load(flags: list[str], slo_yaml: Path, tmp_path: Path) -> None:
    env = {plan_log.ENV: str(tmp_path)}
    with running(tmp_path, *flags, "--slo-config", str(slo_yaml), env=env) as server:
        assert len(load(server)) == 100
        replicas = server.status()["replicas"]
        assert len(replicas) == (2 if "--dp" in flags else 1)
        assert all(r["policy"] == "slo" and r["fallbacks"]["count"] == 0 for r in replicas)
        assert sum(r["totals"]["finished"] for r in replicas) >= 100
        assert server.log.read_text().count("scheduling by deadline") == len(replicas)
    if "--tp" in flags:
        one, two = ((tmp_path / f"rank-{rank}.log").read_text().splitlines() for rank in (0, 1))
        both = min(len(one), len(two))  # stopped between two lines
        assert sum("prefill= " not in line for line in one[:both]) > 10
        assert one[:both] == two[:both]


def test_switched_off_it_is_stock(tmp_path: Path) -> None:
    with running(tmp_path, "--slo-policy", "off") as server:
        assert server.generate(slo="nonsense")["text"]  # as stock: an unknown field is nobody's business
        assert server.status()["policy"] == "off"
        assert "stock SGLang" in server.log.read_text()


def test_sglangs_own_command_has_it_when_the_environment_says_so(tmp_path: Path) -> None:
    # Two tokenizer workers as well: their HTTP apps are made in processes of their own.
    flags = ["--model-path", str(demo_model_path()), *SMALL, "--tokenizer-worker-num", "2"]
    with running(tmp_path, *flags, python=SGLANG_SERVE, env=SWITCHED_ON) as server:
        for _ in range(4):  # whichever worker answers
            assert server.post("/generate", {"text": "a", "slo": {"class": "gold"}}).status_code == 400
            verdict = server.generate(slo={"class": "chat"})["meta_info"]["slo"]
            assert verdict["class"] == "chat"


OFFLINE = """
import sglang
def main():
    engine = sglang.Engine(model_path={path!r}, dtype="float32", max_total_tokens=20000, log_level="info")
    greedy = {{"max_new_tokens": 4, "temperature": 0}}
    for slo in ({{"class": "chat"}}, {{"ttft_ms": -1}}):
        try:
            answer = engine.generate("hello", {{**greedy, "custom_params": {{"slo": slo}}}})
            print("verdict", answer["meta_info"].get("slo", {{}}).get("class"))
        except ValueError as error:
            print("refused", error)
    engine.shutdown()
if __name__ == "__main__":
    main()
"""


def test_the_offline_engine_has_it_when_the_environment_says_so(tmp_path: Path) -> None:
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE.format(path=str(demo_model_path())))
    env = {**os.environ, **SWITCHED_ON}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "verdict chat" in done.stdout
    assert "refused sampling_params.custom_params.slo.ttft_ms" in done.stdout


def test_all_is_served_by_stock_scheduling_where_planning_always_fails(tmp_path: Path) -> None:
    # read by every Python that starts, the scheduler's process among them
    (tmp_path / "sitecustomize.py").write_text(
        "from sglang_slo.core.plan import Planner\n"
        "def fail(*_): raise RuntimeError('planning is broken')\n"
        "Planner.plan = Planner.all_decode = fail\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with running(tmp_path, *SMALL, "--chunked-prefill-size", "64", env={"PYTHONPATH": path}) as server:
        assert len(load(server)) == 100
        fallbacks = server.status()["replicas"][0]["fallbacks"]
        assert fallbacks["count"] > 100
        assert fallbacks["last"] == "RuntimeError: planning is broken"
