"""Whatever of ours raises, and wherever: requests are served all the same, and it is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import real_scheduler as real

from sglang_slo.core.plan import Planner
from sglang_slo.runtime.book import RequestBook
from sglang_slo.runtime.lengths import ArrivingLengths
from sglang_slo.runtime.online_fit import OnlineFit
from sglang_slo.runtime.preempt import Preemptor
from sglang_slo.runtime.reporting import Reporter
from sglang_slo.runtime.viewer import Viewer

COUNT = 6
PLACES = [
    (Planner, "plan"),
    (Viewer, "view"),
    (Viewer, "look_up_prefix"),
    (RequestBook, "open"),
    (RequestBook, "ended"),
    (RequestBook, "launch"),
    (RequestBook, "tokens_out"),
    (ArrivingLengths, "predict"),
    (ArrivingLengths, "confidence"),
    (OnlineFit, "maybe_refit"),
    (OnlineFit, "add"),
    (Preemptor, "measured"),
    (Preemptor, "adjust"),
    (Reporter, "_tokens_out"),
]


@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[f"{o.__name__}.{n}" for o, n in PLACES])
def test_all_is_served_when_something_of_ours_raises(
    owner: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(owner, name, fail)
    sent = [real.request(f"r{i}", p, 12) for i, p in enumerate(real.prompts(COUNT, 60))]
    argv = ["--max-total-tokens", "2000", "--chunked-prefill-size", "64"]
    run = real.run(real.all_at_once(sent), COUNT, argv, tmp_path)
    assert {rid: len(tokens) for rid, tokens in run.tokens.items()} == {f"r{i}": 12 for i in range(COUNT)}
    observer = run.scheduler.slo_observer
    assert observer.trouble.count + observer.snapshot(0.0)["fallbacks"]["count"] > 0
