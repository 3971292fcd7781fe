"""Whoever is in the scheduler is counted wherever SGLang counts, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import real_scheduler as real

SWAP = [
    *("--max-total-tokens", "300", "--slo-kv", "stock", "--schedule-conservativeness", "0.05"),
    *(
        "--slo-length",
        "none",
        "--slo-max-preemptions",
        "50",
        "--slo-host-kv-gb",
        "0.004",
        "--slo-preempt",
        "swap",
    ),
]


def test_requests_on_the_host_and_in_parts_of_a_batch_are_counted_once(tmp_path: Path) -> None:
    sent = [real.request(f"r{i}", p, 30) for i, p in enumerate(real.prompts(8, 20))]
    on_host: list[int] = []

    def script(scheduler: Any, iteration: int) -> list[Any]:
        if iteration == 1:
            return sent
        if iteration > 2 and not scheduler.is_fully_idle():
            load, live = scheduler.load_inquirer.get_loads(), len(scheduler.slo_registry.reqs)
            assert load.num_running_reqs + load.num_waiting_reqs == live
            assert scheduler.metrics_reporter.scheduler.waiting_queue == scheduler._waiting()
            on_host.append(len(scheduler.slo_preempt.line.out))
        return []

    run = real.run(script, 8, [*SWAP, "--disable-overlap-schedule"], tmp_path)
    assert len(run.tokens) == 8
    assert max(on_host) > 0, "nobody was on the host"
    assert not run.scheduler._running() and not run.scheduler._waiting()
    assert run.scheduler.metrics_reporter.scheduler.forward_ct == run.scheduler.forward_ct
