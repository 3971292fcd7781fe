"""Several tokenizer workers: how uvicorn is told to start them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints import http_server

from sglang_slo.config import SloConfig
from sglang_slo.server import http_app


@pytest.mark.parametrize(("said", "expected"), [(None, http_app.WORKER_START_S), ("7", 7)])
def test_workers_are_given_time_to_start_unless_the_operator_says_how_much(
    said: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if said is None:
        monkeypatch.delenv(http_app.HEALTH_ENV, raising=False)
    else:
        monkeypatch.setenv(http_app.HEALTH_ENV, said)
    monkeypatch.setattr(SloConfig, "from_env", classmethod(lambda cls: SloConfig()))
    told: dict[str, Any] = {}

    def run(app: Any, **options: Any) -> None:
        told.update(options, app=app)

    real = SimpleNamespace(run=run, Config=None, Server=None)
    monkeypatch.setattr(http_server, "uvicorn", real)

    def serve(server_args: Any) -> None:
        seconds = http_server.envs.SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT.get()
        http_server.uvicorn.run("sglang", timeout_worker_healthcheck=seconds)

    http_app.serve_with_deadlines(serve, SimpleNamespace(tokenizer_worker_num=2))
    assert told == {"app": http_app.WORKER_APP, "timeout_worker_healthcheck": expected}
    assert http_server.uvicorn is real
