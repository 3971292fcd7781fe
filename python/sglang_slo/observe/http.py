"""`GET /slo/status` (JSON) and `GET /slo` (a page that shows it live), as routes of SGLang's own HTTP server.

The figures live in the scheduler processes; they come by SGLang's own internal-state call, which asks every
data-parallel replica. All viewers share one call at most every `FRESH_S`, so that watching costs the
schedulers the same however many watch, and a scheduler that does not answer costs a viewer `PATIENCE_S`, not
forever.

SGLang's own `GET /v1/loads` tells headroom beside its figures, from the same shared call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse

from sglang_slo import __version__, clock
from sglang_slo.config import SloConfig
from sglang_slo.core.slo import SloClass
from sglang_slo.observe import counts
from sglang_slo.observe.window import ALL_CLASSES

PAGE = "/slo"
FRESH_S = 0.5
PATIENCE_S = 5.0
LOADS = "/v1/loads"  # SGLang's, where routers look
LOADS_PATIENCE_S = 1.0  # routers ask often: later than that they get SGLang's own answer alone
OFF = "the deadline scheduler is switched off (--slo-policy off): stock SGLang schedules"
NOT_COVERED = "stock SGLang schedules: the server runs in a mode that the deadline scheduler does not cover"

ATTAINMENT_TARGET = 0.9  # of each class; below it the page says that promises are broken
ADDED_BY_KEY = ("attained_by_rule", "misses")
_COUNTED = ("judged", "attained", "finished", "arrived", "without_limits")
ADDED = (*_COUNTED, "goodput_rps", "goodput_tokens_per_s", "throughput_rps")  # add up over replicas

InternalStates = Callable[[], Awaitable[Sequence[dict[str, Any]]]]
Loads = Callable[[int | None, str | None, str | None], Awaitable[Any]]  # dp_rank, include, format


class SharedCall:
    """One call in flight, its last result kept for `FRESH_S`."""

    def __init__(self, call: InternalStates) -> None:
        self._call = call
        self._task: asyncio.Task[list[dict[str, Any]]] | None = None
        self._done_s = 0.0

    async def result(self) -> list[dict[str, Any]]:
        """The replicas' internal states. Raises TimeoutError after `PATIENCE_S`; the call itself goes on."""
        stale = self._task is not None and self._task.done() and clock.now() - self._done_s > FRESH_S
        if self._task is None or stale:
            self._task = asyncio.create_task(self._run())
        return await asyncio.wait_for(asyncio.shield(self._task), PATIENCE_S)

    async def _run(self) -> list[dict[str, Any]]:
        try:
            return list(await self._call())
        finally:
            self._done_s = clock.now()


def status(config: SloConfig | None, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answer of `/slo/status`: what each replica says, and the sums over replicas."""
    replicas = sorted((s["slo"] for s in states if s.get("slo")), key=lambda s: s.get("dp_rank", 0))
    out: dict[str, Any] = {"policy": "off" if config is None else config.policy, "version": __version__}
    if out["policy"] == "off":
        out["message"] = OFF
    elif not replicas:
        out |= {"policy": "stock", "message": NOT_COVERED}
    if config is not None:
        out["classes"] = {name: _declared(c) for name, c in config.classes.items()}
    out["windows"] = _sums([r["windows"] for r in replicas if "windows" in r])
    out["verdict"] = verdict(out["windows"], replicas)
    out["replicas"] = replicas
    return out


def _declared(slo_class: SloClass) -> dict[str, Any]:
    """What a class declares, without what it leaves out."""
    return {name: value for name, value in asdict(slo_class).items() if value}


def _sums(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Window -> class -> figures over replicas: counts add up, of longest pauses the worst one stands."""
    sums: dict[str, Any] = {}
    for report in reports:
        for window, classes in report.items():
            for slo_class, figures in classes.items():
                total = sums.setdefault(window, {}).setdefault(slo_class, _nothing())
                for name in ADDED:
                    total[name] += figures[name]
                for name in ADDED_BY_KEY:
                    for key, count in figures[name].items():
                        total[name][key] = total[name].get(key, 0) + count
                for name, pause_ms in figures["longest_pause_ms"].items():
                    worst = total["longest_pause_ms"].get(name)
                    total["longest_pause_ms"][name] = max(worst or 0.0, pause_ms or 0.0) or pause_ms
                judged = total["judged"]
                total["attainment"] = total["attained"] / judged if judged else None
                total["attainment_by_rule"] = {
                    rule: kept / judged if judged else None
                    for rule, kept in total["attained_by_rule"].items()
                }
    return sums


def _nothing() -> dict[str, Any]:
    return {**dict.fromkeys(ADDED, 0), **{name: {} for name in ADDED_BY_KEY}, "longest_pause_ms": {}}


def verdict(windows: dict[str, Any], replicas: Sequence[dict[str, Any]]) -> str:
    """One line: whether promises are kept and, if not, why; of the shortest window in which anything was judged."""
    failed = sum(r.get("fallbacks", {}).get("count", 0) for r in replicas)
    trouble = f" Planning failed {failed} times since the start: see the log." if failed else ""
    for window, classes in windows.items():
        judged = {n: f for n, f in classes.items() if f["judged"] and n != ALL_CLASSES}
        if not judged:
            continue
        bad = sorted(
            (f["attainment"], name) for name, f in judged.items() if f["attainment"] < ATTAINMENT_TARGET
        )
        if not bad:
            return (
                f"Promises are kept: at least {ATTAINMENT_TARGET:.0%} of every class, last {window}.{trouble}"
            )
        return (
            "Promises are broken, last "
            + window
            + ": "
            + "; ".join(_why(name, judged[name]) for _, name in bad)
            + "."
            + trouble
        )
    return "No request with a limit has finished yet." + trouble


def _why(name: str, figures: dict[str, Any]) -> str:
    misses = sorted(((count, reason) for reason, count in figures["misses"].items() if count), reverse=True)
    why = ", ".join(f"{reason} {count}" for count, reason in misses)
    pause_ms = figures["longest_pause_ms"].get("max")
    pause = f", longest pause {pause_ms / 1e3:.3g} s" if pause_ms else ""
    return f"{name} {figures['attainment']:.1%} of {figures['judged']} (misses: {why}{pause})"


async def _sglang_states() -> Sequence[dict[str, Any]]:
    from sglang.srt.entrypoints import http_server

    states: Sequence[dict[str, Any]] = await http_server._global_state.tokenizer_manager.get_internal_state()
    return states


async def sglang_loads(dp_rank: int | None, include: str | None, format: str | None) -> Any:
    """SGLang's own answer of `/v1/loads`."""
    from sglang.srt.entrypoints import v1_loads

    return await v1_loads.get_loads(dp_rank, include, format, v1_loads._get_tokenizer_manager())


def add_routes(app: FastAPI, states: InternalStates = _sglang_states, loads: Loads | None = None) -> None:
    """Add `/slo/status` and `/slo` to SGLang's app, with `loads` also our `/v1/loads`. Idempotent.

    Settings are read from the environment.
    """
    if any(getattr(route, "path", None) == "/slo/status" for route in app.routes):
        return
    shared = SharedCall(states)
    page = resources.files("sglang_slo.observe").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/slo/status", response_class=JSONResponse)
    async def slo_status() -> JSONResponse:
        config = SloConfig.from_env()
        if config is None or config.policy == "off":
            return JSONResponse(status(config, []))
        try:
            return JSONResponse({**status(config, await shared.result()), "requests": counts.snapshot()})
        except (asyncio.TimeoutError, TimeoutError):
            message = f"no answer from the scheduler within {PATIENCE_S:g} s"
            return JSONResponse({"policy": config.policy, "error": message}, status_code=503)

    @app.get(PAGE, response_class=HTMLResponse)
    async def slo_page() -> HTMLResponse:
        return HTMLResponse(page)

    if loads is not None:
        _add_loads(app, loads, shared)


def _add_loads(app: FastAPI, loads: Loads, shared: SharedCall) -> None:
    """Add `/v1/loads`, before SGLang's own, whose answer is `loads`."""

    @app.get(LOADS)
    async def slo_loads(
        dp_rank: int | None = None, include: str | None = None, format: str | None = None
    ) -> Any:
        answer = await loads(dp_rank, include, format)
        if isinstance(answer, dict):
            with suppress(Exception):  # SGLang's own answer stands, whatever becomes of ours
                _tell_headroom(answer["loads"], await asyncio.wait_for(shared.result(), LOADS_PATIENCE_S))
        return answer

    app.router.routes.insert(0, app.router.routes.pop())  # the first that matches answers


def _tell_headroom(loads: Sequence[dict[str, Any]], states: Sequence[dict[str, Any]]) -> None:
    """Add `slo` to each data-parallel rank's load: headroom by class, and the prefill that waits."""
    now = {s["slo"].get("dp_rank", 0): s["slo"].get("now") for s in states if s.get("slo")}
    for load in loads:
        if now.get(load["dp_rank"]):
            load["slo"] = {name: now[load["dp_rank"]][name] for name in ("headroom", "backlog_tokens")}


def open_page() -> None:
    """Let a browser open the page, which holds no figures, without the API key; it asks for that itself. Idempotent."""
    from sglang.srt.utils import auth

    original = auth.decide_request_auth
    if getattr(original, "opens_page", False):
        return

    def decide(*, method: str, path: str, **how: Any) -> Any:
        if method == "GET" and path == PAGE:
            return auth.AuthDecision(allowed=True)
        return original(method=method, path=path, **how)

    decide.opens_page = True  # type: ignore[attr-defined]
    auth.decide_request_auth = decide
