"""What this package adds to SGLang's HTTP app, and how it gets there in every way of starting a server.

`serve_with_deadlines` wraps SGLang's own `_setup_and_run_http_server` (plugin.py registers it), so that one
process or several tokenizer workers serve the same additions. With several workers uvicorn imports the app
by name in each: it is given the name of `http_worker` instead, which prepares SGLang's app while being
imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sglang_slo.config import SloConfig
from sglang_slo.observe import metrics
from sglang_slo.observe.http import add_routes, open_page, sglang_loads
from sglang_slo.server import contract, verdicts
from sglang_slo.server.ingress import Ingress

WORKER_APP = "sglang_slo.server.http_worker:app"
HEALTH_ENV = "SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT"
# A worker answers uvicorn only once it has imported SGLang. With SGLang's 10 s, on a busy machine each is killed while
# it starts, and started anew, for ever.
WORKER_START_S = 120


def prepare(app: Any, config: SloConfig) -> None:
    """Put our routes into SGLang's FastAPI app, and the ingress behind authentication and decompression.

    With policy `off` the status route only, which says so. Idempotent.
    """
    from starlette.middleware import Middleware

    add_routes(app, loads=None if config.policy == "off" else sglang_loads)
    open_page()
    if config.policy == "off":
        return
    verdicts.install()
    contract.install()
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # before that is set the client must not be imported
        metrics.hide_gone()
    if not any(m.cls is Ingress for m in app.user_middleware):
        app.user_middleware.append(Middleware(Ingress, config=config))


def serve_with_deadlines(serve: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """SGLang's `_setup_and_run_http_server(server_args, ...)` with our additions in its app."""
    from sglang.srt.entrypoints import http_server

    config = SloConfig.from_env()
    server_args = args[0] if args else kwargs["server_args"]
    if config is None:
        return serve(*args, **kwargs)
    if server_args.tokenizer_worker_num == 1:
        prepare(http_server.app, config)
        return serve(*args, **kwargs)
    uvicorn = http_server.uvicorn
    http_server.uvicorn = SimpleNamespace(
        run=lambda app, **options: uvicorn.run(WORKER_APP, **_patient(options)),
        Config=uvicorn.Config,
        Server=uvicorn.Server,
    )
    try:
        return serve(*args, **kwargs)
    finally:
        http_server.uvicorn = uvicorn


def _patient(options: dict[str, Any]) -> dict[str, Any]:
    """uvicorn's options, with time for workers to start unless the operator has said how long they may take."""
    if HEALTH_ENV in os.environ:
        return options
    given = options.get("timeout_worker_healthcheck") or 0
    return {**options, "timeout_worker_healthcheck": max(given, WORKER_START_S)}
