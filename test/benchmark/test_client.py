"""The replay client against a server that streams like SGLang's: times, exact lengths, errors, limits."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from client import Answer, body, replay, score, slo_field
from sglang_slo.core.slo import BEST_EFFORT, Slo
from sglang_slo.twin.workloads.workload import Workload, load_workload


@pytest.fixture
def workload() -> Workload:
    few = load_workload("mix-generated", max_requests=6, load=50.0)
    return replace(few, input_tokens=np.full(6, 20), output_tokens=np.full(6, 4))


@pytest.fixture
def serve() -> Iterator[Callable[[Any], str]]:
    """Starts a server around one handler of /generate; returns its URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def flush(_: web.Request) -> web.Response:
        return web.Response()

    async def up(handler: Any) -> int:
        app = web.Application()
        app.router.add_post("/generate", handler)
        app.router.add_post("/flush_cache", flush)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return int(runner.addresses[0][1])

    def start(handler: Any) -> str:
        return f"http://127.0.0.1:{asyncio.run_coroutine_threadsafe(up(handler), loop).result()}"

    yield start
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


async def stream(request: web.Request, counts: list[int], final: dict[str, Any]) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for count in counts:
        reason = final if count == counts[-1] else None
        event = {"text": "", "meta_info": {"completion_tokens": count, "finish_reason": reason}}
        await response.write(f"data: {json.dumps(event)}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response


def test_every_token_of_every_request_is_timed(workload: Workload, serve: Callable[[Any], str]) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream(request, [1, 2, 3, 4], {"type": "length"})

    result = replay(workload, serve(handler), "x")
    assert result.requests.finished.all()
    assert (result.requests.ttft_s > 0).all() and (result.requests.tbt_s >= 0).all()
    assert result.notes["errors"] == 0


def test_tokens_in_one_event_came_at_one_time(workload: Workload, serve: Callable[[Any], str]) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream(request, [4], {"type": "length"})

    result = replay(workload, serve(handler), "x")
    assert result.requests.finished.all()
    assert (result.requests.max_gap_s == 0).all()


@pytest.mark.parametrize(
    ("counts", "final"),
    [
        ([1, 2], {"type": "length"}),
        ([1, 2], {"type": "abort", "message": "no room"}),
        ([0], {"type": "abort"}),
    ],
)
def test_a_request_cut_short_is_not_finished(
    workload: Workload, serve: Callable[[Any], str], counts: list[int], final: dict[str, Any]
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        sent = await request.json()
        warm = len(seen) < 3
        seen.append(sent)
        return await stream(request, [4] if warm else counts, {"type": "length"} if warm else final)

    seen: list[Any] = []
    result = replay(workload, serve(handler), "x")
    assert result.attainment == 0 and not result.requests.finished.any()


def test_a_refused_request_is_an_error_and_the_others_go_on(
    workload: Workload, serve: Callable[[Any], str]
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append(await request.json())
        if len(seen) == 5:
            return web.Response(status=503, text="busy")
        return await stream(request, [1, 2, 3, 4], {"type": "length"})

    seen: list[Any] = []
    result = replay(workload, serve(handler), "x")
    assert result.notes["errors"] == 1
    assert result.requests.finished.sum() == 5


def test_a_server_that_fails_the_warm_up_is_reported(workload: Workload, serve: Callable[[Any], str]) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(status=500, text="broken")

    with pytest.raises(RuntimeError, match="HTTP 500: broken"):
        replay(workload, serve(handler), "x")


def test_a_late_answer_is_judged_from_the_planned_arrival(workload: Workload) -> None:
    arrivals = workload.arrival_s
    answers = [Answer([a + 10.0, a + 10.01, a + 10.02, a + 10.03], lag_s=3.0) for a in arrivals.tolist()]
    rows = score(workload, answers, "x", {}).requests
    assert rows.ttft_s == pytest.approx(10.0)
    assert rows.tbt_s == pytest.approx(0.01)


def test_requests_carry_exact_lengths_and_the_limits_of_their_class(workload: Workload) -> None:
    for i in range(len(workload)):
        sent = body(workload, i)
        assert len(sent["input_ids"]) == workload.input_tokens[i]
        assert sent["sampling_params"]["max_new_tokens"] == workload.output_tokens[i]
        assert sent["sampling_params"]["ignore_eos"] is True
        limits = workload.limits[int(workload.class_id[i])]
        assert sent["slo"] == {"ttft_ms": limits.ttft_s * 1e3, "tbt_ms": limits.tbt_s * 1e3}
        assert min(sent["input_ids"]) >= 100 and max(sent["input_ids"]) < 500


def test_no_limit_is_not_sent() -> None:
    assert slo_field(BEST_EFFORT) == {}
    assert slo_field(Slo(ttft_s=1.0)) == {"ttft_ms": 1000.0}
