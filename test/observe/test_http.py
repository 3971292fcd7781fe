"""`/slo/status` and `/slo` answer whatever the schedulers do, at a bounded cost to them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Response
from fastapi.testclient import TestClient

from observed import make_record
from sglang_slo import clock
from sglang_slo.config import ENV, SloConfig
from sglang_slo.core.slo import Slo, SloClass
from sglang_slo.observe import http
from sglang_slo.observe.observer import Observer

CHAT = Slo(0.5, 0.05, "chat")


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(ENV, SloConfig(classes={"chat": SloClass(500, 50)}).to_json())
    yield
    clock.use(None)


def snapshot(dp_rank: int, ttft_s: float) -> dict[str, Any]:
    observer = Observer(SloConfig(), dp_rank=dp_rank, start_s=0.0)
    observer.finished(make_record(ttft_s, (0.01,), CHAT), 1.0)
    return observer.snapshot(1.0)


class Schedulers:
    """Two replicas that count how often they are asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.states: list[dict[str, Any]] = [{"slo": snapshot(1, 0.9)}, {"slo": snapshot(0, 0.1)}]
        self.silent = False

    async def __call__(self) -> list[dict[str, Any]]:
        self.asked += 1
        if self.silent:
            await asyncio.Event().wait()
        return self.states


@pytest.fixture
def schedulers() -> Schedulers:
    return Schedulers()


@pytest.fixture
def client(schedulers: Schedulers) -> Iterator[TestClient]:
    app = FastAPI()
    http.add_routes(app, schedulers)
    with TestClient(app) as client:
        yield client


def test_status_sums_replicas_and_lists_them_in_order(client: TestClient) -> None:
    status = client.get("/slo/status").json()
    assert status["policy"] == "slo"
    assert status["classes"] == {"chat": {"ttft_ms": 500, "tbt_ms": 50}}
    assert [r["dp_rank"] for r in status["replicas"]] == [0, 1]
    assert status["windows"]["1m"]["chat"]["attainment"] == 0.5
    assert status["windows"]["1m"]["chat"]["judged"] == 2


def test_the_page_opens_without_the_key_and_figures_do_not(
    schedulers: Schedulers, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.utils import auth

    monkeypatch.setattr(auth, "decide_request_auth", auth.decide_request_auth)  # restored afterwards
    http.open_page()
    http.open_page()
    app = FastAPI()
    http.add_routes(app, schedulers)
    auth.add_api_key_middleware(app, api_key="k", admin_api_key=None)
    with TestClient(app) as locked:
        assert locked.get("/slo").status_code == 200
        assert locked.post("/slo").status_code == locked.get("/slo/other").status_code == 401
        assert locked.get("/slo/status").status_code == 401
        assert locked.get("/slo/status", headers={"authorization": "Bearer k"}).status_code == 200


def test_viewers_share_one_call(client: TestClient, schedulers: Schedulers) -> None:
    clock.use(lambda: 10.0)
    for _ in range(5):
        client.get("/slo/status")
    assert schedulers.asked == 1
    clock.use(lambda: 10.0 + 2 * http.FRESH_S)
    client.get("/slo/status")
    assert schedulers.asked == 2


def test_silent_scheduler_gets_503_and_is_asked_once(
    client: TestClient, schedulers: Schedulers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "PATIENCE_S", 0.05)
    schedulers.silent = True
    for _ in range(3):
        answer = client.get("/slo/status")
        assert answer.status_code == 503
        assert "no answer" in answer.json()["error"]
    assert schedulers.asked == 1


@pytest.mark.parametrize("policy", ["off", None])
def test_switched_off_says_so_and_asks_nobody(
    client: TestClient, schedulers: Schedulers, policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if policy:
        monkeypatch.setenv(ENV, SloConfig(policy=policy).to_json())
    else:
        monkeypatch.delenv(ENV)
    status = client.get("/slo/status").json()
    assert (status["policy"], status["replicas"]) == ("off", [])
    assert "stock" in status["message"]
    assert schedulers.asked == 0


def test_mode_that_is_not_covered_says_so(client: TestClient, schedulers: Schedulers) -> None:
    schedulers.states = [{"last_gen_throughput": 0.0}]
    status = client.get("/slo/status").json()
    assert status["policy"] == "stock"
    assert status["message"] == http.NOT_COVERED


def test_page_is_self_contained(client: TestClient) -> None:
    answer = client.get("/slo")
    assert answer.headers["content-type"].startswith("text/html")
    assert "prefers-color-scheme" in answer.text
    outside = [url for url in re.findall(r"https?://[^\s\"']+", answer.text) if "w3.org" not in url]
    assert not outside
    assert not re.findall(r"(?:src|href)=", answer.text)


@pytest.fixture
def loads(schedulers: Schedulers) -> Iterator[TestClient]:
    app = FastAPI()

    @app.get("/v1/loads")
    async def of_sglang() -> str:
        return "not this one"

    async def loads(dp_rank: int | None, include: str | None, format: str | None) -> Any:
        ranks = [{"dp_rank": rank, "num_waiting_reqs": 7} for rank in (0, 1, 2)]
        return Response("text") if format == "prometheus" else {"version": "1", "loads": ranks}

    http.add_routes(app, schedulers, loads)
    with TestClient(app) as client:
        yield client


NOW = {"headroom": {"chat": {"tokens_per_s": 5.0, "kv_tokens": 6}}, "backlog_tokens": 30, "running": 2}


def test_loads_tell_the_headroom_of_each_rank_beside_sglangs_figures(
    loads: TestClient, schedulers: Schedulers
) -> None:
    schedulers.states = [{"slo": {"dp_rank": 1, "now": NOW}}, {"slo": {"dp_rank": 2, "now": None}}, {}]
    told = loads.get("/v1/loads").json()
    own = {"num_waiting_reqs": 7}
    slo = {name: NOW[name] for name in ("headroom", "backlog_tokens")}
    assert told == {
        "version": "1",
        "loads": [{"dp_rank": 0, **own}, {"dp_rank": 1, **own, "slo": slo}, {"dp_rank": 2, **own}],
    }
    assert loads.get("/v1/loads?format=prometheus").text == "text"


def test_loads_come_without_headroom_where_a_scheduler_is_silent(
    loads: TestClient, schedulers: Schedulers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "LOADS_PATIENCE_S", 0.05)
    schedulers.silent = True
    assert [set(load) for load in loads.get("/v1/loads").json()["loads"]] == 3 * [
        {"dp_rank", "num_waiting_reqs"}
    ]
