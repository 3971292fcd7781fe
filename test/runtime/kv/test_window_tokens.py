"""Sliding windows in a real scheduler with a model that computes them: no token changes, whoever leaves and returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import real_scheduler as real
from crowded import BOLD, COUNT, MANY, requests
from invariants import check_nothing_left
from sglang_slo.runtime.sglang import pools

pytestmark = pytest.mark.skipif(not pools.WINDOWS, reason="runs on stock scheduling there")

WINDOW = 24
SEEN = {"window": WINDOW}  # by the first layer; -1: everything
MODEL = {"is_hybrid_swa": True, "hybrid_layer_pattern": [1, 0], "sliding_window_size": WINDOW}
SLIDING = ["--json-model-override-args", json.dumps(MODEL), "--swa-full-tokens-ratio"]
OVERLAP = {"overlap": [], "no overlap": ["--disable-overlap-schedule"]}
PAGES = {"page 1": [], "page 16": ["--page-size", "16"]}
# tokens of the pools: both are short, the window's alone is
SHORT = {
    "both": ["--max-total-tokens", "400", *SLIDING, "0.9"],
    "window": ["--max-total-tokens", "4000", *SLIDING, "0.08"],
}


@pytest.fixture(scope="module", autouse=True)
def a_layer_that_looks_back_over_a_window() -> object:
    """The demo model's first layer, and what leaves its window is given back soon."""
    from sglang.srt.models.llama import LlamaForCausalLM

    built = LlamaForCausalLM.__init__

    def init(self: object, *args: object, **kwargs: object) -> None:
        built(self, *args, **kwargs)
        self.model.layers[0].self_attn.attn.sliding_window_size = SEEN["window"]  # type: ignore[attr-defined]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "__init__", init)
        patch.setattr(
            LlamaForCausalLM, "get_attention_sliding_window_size", lambda self: WINDOW, raising=False
        )
        patch.setenv("SGLANG_SWA_EVICTION_INTERVAL", "8")
        yield


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[int]]:
    """SGLang's own tokens, with room for everyone."""
    argv = ["--max-total-tokens", "20000", *SLIDING, "0.8"]
    return real.run(real.all_at_once(requests()), COUNT, argv, folder, False).tokens


def test_a_pool_for_the_window_changes_no_token_and_the_window_does(
    expected: dict[str, list[int]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ["--max-total-tokens", "20000"]
    assert real.run(real.all_at_once(requests()), COUNT, plain, folder, False).tokens == expected
    monkeypatch.setitem(SEEN, "window", -1)
    assert real.run(real.all_at_once(requests()), COUNT, plain, folder, False).tokens != expected


@pytest.mark.parametrize(
    ("way", "overlap", "pages", "short"),
    [
        ("keep", "overlap", "page 1", "both"),
        ("keep", "no overlap", "page 16", "both"),
        ("recompute", "no overlap", "page 1", "window"),
        ("recompute", "overlap", "page 16", "both"),
    ],
)
def test_tokens_are_the_same_whichever_way_out(
    way: str, overlap: str, pages: str, short: str, folder: Path, expected: dict[str, list[int]]
) -> None:
    argv = [*SHORT[short], *BOLD, *MANY, "--slo-preempt", way, *OVERLAP[overlap], *PAGES[pages]]
    run = real.run(real.all_at_once(requests()), COUNT, argv, folder)
    assert run.scheduler.slo_on and run.tokens == expected
    assert short == "window" or run.counts.get(way, 0) > 0
    assert run.scheduler.slo_observer.fallbacks.count == run.scheduler.slo_observer.trouble.count == 0
    check_nothing_left(run.scheduler)


@pytest.mark.parametrize("pages", ["page 16"])
def test_tokens_are_the_same_of_prompts_in_pieces_that_are_set_aside(pages: str, folder: Path) -> None:
    """Long prompts without a deadline in small pieces, and short ones that come between them."""

    def script(scheduler: object, iteration: int) -> list[object]:
        if iteration == 1:
            return [real.request(f"long{i}", p, 20) for i, p in enumerate(real.prompts(3, 300))]
        urgent = {"slo": {"ttft_ms": 2000, "tbt_ms": 500}}
        number, now = divmod(iteration, 4)
        if now == 0 and 1 <= number <= 6:
            prompt = [100 + number, *range(20, 50)]
            return [real.request(f"short{number}", prompt, 12, custom_params=urgent)]
        return []

    argv = ["--max-total-tokens", "1600", *SLIDING, "0.3", "--chunked-prefill-size", "64", *PAGES[pages]]
    ours, stock = (real.run(script, 9, argv, folder, slo) for slo in (True, False))
    assert ours.scheduler.slo_on and ours.tokens == stock.tokens
    assert ours.scheduler.slo_observer.fallbacks.count == ours.scheduler.slo_observer.trouble.count == 0
    check_nothing_left(ours.scheduler)
