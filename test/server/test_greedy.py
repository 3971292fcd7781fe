"""Whatever is scheduled when, the words are stock SGLang's."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import pytest

from conftest import Server, running
from sglang_slo.runtime.demo_model import demo_model_path

pytestmark = pytest.mark.server

# a pool and chunks so small that prompts are cut and set aside half-way
POOL = ["--dtype", "float32", "--max-total-tokens", "6000", "--chunked-prefill-size", "256"]
REQUESTS = 200


def _prompt(i: int) -> str:
    words = 600 if i % 10 == 0 else 3 + i % 40
    return f"{i} " + " ".join(f"w{(i * 7 + j) % 97}" for j in range(words))


def _answers(server: Server, limits: bool) -> list[str]:
    def ask(i: int) -> str:
        slo = {}
        if limits and i % 3:
            slo = {"slo": {"ttft_ms": 200 if i % 3 == 1 else 60_000, "tbt_ms": 2000}}
        return str(server.generate(_prompt(i), 8 + i % 25, **slo)["text"])

    with concurrent.futures.ThreadPoolExecutor(48) as pool:
        return list(pool.map(ask, range(REQUESTS)))


@pytest.mark.parametrize("overlap", [[], ["--disable-overlap-schedule"]], ids=["overlap", "no overlap"])
def test_200_greedy_answers_are_stocks_also_of_requests_that_were_set_aside(
    overlap: list[str], tmp_path: Path
) -> None:
    (tmp_path / "stock").mkdir()
    (tmp_path / "ours").mkdir()
    model = ["--model-path", str(demo_model_path())]
    with running(tmp_path / "stock", *model, *POOL, *overlap, "--device", "cpu", *CPU, module=STOCK) as stock:
        expected = _answers(stock, limits=False)
    with running(tmp_path / "ours", *POOL, *overlap) as ours:
        got = _answers(ours, limits=True)
        ours.settle()
        totals = ours.status()["replicas"][0]["totals"]
    assert totals["parked"] > 0, "nobody was set aside: this run shows nothing"
    different = [i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b]
    assert not different


STOCK = "sglang.launch_server"
CPU = ["--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
