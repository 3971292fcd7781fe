"""Whatever of ours raises, and wherever: requests are served all the same, and it is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import real_scheduler as real
from invariants import holders
from sglang_slo.core.plan import Planner
from sglang_slo.runtime.kv.look_up import PrefixLookUp
from sglang_slo.runtime.kv.preempt import Preemptor
from sglang_slo.runtime.kv.swap_cost import SwapCost
from sglang_slo.runtime.latency.online_fit import OnlineFit
from sglang_slo.runtime.report.request_times import Reporter
from sglang_slo.runtime.requests.lengths import ArrivingLengths
from sglang_slo.runtime.requests.registry import RequestRegistry
from sglang_slo.runtime.scheduler.applier import Applier
from sglang_slo.runtime.scheduler.viewer import Viewer
from waves import Break, Wave, waves

COUNT, OUTPUT = 6, 12  # requests a wave, tokens each
PLACES = [
    (Planner, "plan"),
    (Viewer, "view"),
    (PrefixLookUp, "look_up"),
    (RequestRegistry, "open"),
    (RequestRegistry, "ended"),
    (RequestRegistry, "launch"),
    (RequestRegistry, "tokens_out"),
    (ArrivingLengths, "predict"),
    (ArrivingLengths, "confidence"),
    (OnlineFit, "maybe_refit"),
    (OnlineFit, "add"),
    (SwapCost, "measured"),
    (Preemptor, "host"),
    (Preemptor, "arrived"),
    (Applier, "prefill"),
    (Reporter, "_tokens_out"),
]


IDS = [f"{owner.__name__}.{name}" for owner, name in PLACES]


def _fail(*_: object, **__: object) -> None:
    raise RuntimeError("broken")


def _broken(owner: Any, name: str) -> Break:
    return lambda patch: patch.setattr(owner, name, _fail)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> list[Wave]:
    """A wave of requests for each place."""
    prompts = list(real.prompts(COUNT, 60))

    def requests(prefix: str) -> list[Any]:
        return [real.request(f"{prefix}{i}", prompt, OUTPUT) for i, prompt in enumerate(prompts)]

    argv = ["--max-total-tokens", "2000", "--chunked-prefill-size", "64"]
    return waves([_broken(*place) for place in PLACES], requests, argv, tmp_path_factory.mktemp("trouble"))


@pytest.mark.parametrize("place", range(len(PLACES)), ids=IDS)
def test_all_is_served_when_something_of_ours_raises(place: int, served: list[Wave]) -> None:
    wave = served[place]
    assert {name: len(tokens) for name, tokens in wave.tokens.items()} == {
        str(i): OUTPUT for i in range(COUNT)
    }
    assert wave.troubles > 0


def test_who_was_begun_without_a_row_has_one_as_soon_as_rows_can_be_given(tmp_path: Path) -> None:
    """Decoding or half prefilled: planning is ours again, and reads nobody else's row for them."""
    lengths = [60, 60, 60, 400]
    seen: list[tuple[int, list[int]]] = []  # (fallbacks so far, rows of who is there)

    def script(scheduler: Any, iteration: int) -> list[Any]:
        if iteration == 1:
            patch.setattr(RequestRegistry, "open", _fail)
            prompts = (next(real.prompts(1, n)) for n in lengths)
            return [real.request(f"r{i}", prompt, 30) for i, prompt in enumerate(prompts)]
        if scheduler.chunked_req is not None and scheduler.running_batch.reqs and not seen:
            patch.undo()
            seen.append((0, []))
        elif seen:
            seen.append(
                (
                    int(scheduler.slo_observer.snapshot(0.0)["fallbacks"]["count"]),
                    [r.slo_row for r in holders(scheduler) if not r.finished()],
                )
            )
        return []

    argv = ["--max-total-tokens", "2000", "--chunked-prefill-size", "64"]
    with pytest.MonkeyPatch.context() as patch:
        run = real.run(script, len(lengths), argv, tmp_path)
    assert all(len(tokens) == 30 for tokens in run.tokens.values()) and len(run.tokens) == len(lengths)
    (_, mended, *later) = seen
    assert len(mended[1]) == len(lengths) and all(row >= 0 for _, rows in (mended, *later) for row in rows)
    assert {fallbacks for fallbacks, _ in later} == {mended[0]}


def test_a_prompt_without_tokens_is_refused_and_takes_nobody_with_it(tmp_path: Path) -> None:
    """The door refuses it by name; a turn of a session, whose history may be as empty, is let through there."""
    sent = {"empty": [], "sound": next(iter(real.prompts(1, 20)))}

    def script(scheduler: Any, iteration: int) -> list[Any]:
        if iteration > 2:
            return []
        rid = ("empty", "sound")[iteration - 1]
        return [real.request(rid, sent[rid], 5)]

    run = real.run(script, 2, ["--max-total-tokens", "2000"], tmp_path)
    assert run.aborted == ["empty"] and len(run.tokens["sound"]) == 5
