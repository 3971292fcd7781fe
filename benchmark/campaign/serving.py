"""A real server under test: its processes, what they hold, and how to ask it something. Loopback only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

import servers

ANSWER_S = 120.0  # an answer that takes longer counts as a hang
CALM_S = 60.0


@dataclass
class Check:
    """One thing that was tried. `held` None: it could not be tried here, and `detail` says why."""

    name: str
    held: bool | None
    detail: str
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came back. `status` 0: nothing did, and `body` is the error's name; `hung`: not in time."""

    status: int
    body: Any

    @property
    def hung(self) -> bool:
        """Whether time ran out."""
        return self.status == 0 and self.body == "TimeoutError"


class Client:
    """Asks one server."""

    def __init__(self, url: str, most_connections: int = 64) -> None:
        self.url, self._most = url, most_connections

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(limit=self._most)
        self.session = aiohttp.ClientSession(connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def ask(
        self, path: str, body: Any, headers: dict[str, str] | None = None, limit_s: float = ANSWER_S
    ) -> Answer:
        """POST `body` (bytes: as they are); GET where it is None. Never raises."""
        method = "GET" if body is None else "POST"
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            async with asyncio.timeout(limit_s):
                sent = {"content-type": "application/json", **(headers or {})}
                async with self.session.request(method, self.url + path, data=data, headers=sent) as answer:
                    text = await answer.text(errors="replace")
        except Exception as error:
            return Answer(0, type(error).__name__)
        with contextlib.suppress(ValueError):
            return Answer(answer.status, json.loads(text))
        return Answer(answer.status, text)

    async def generate(self, ids: list[int], tokens: int, limit_s: float = ANSWER_S, **fields: Any) -> Answer:
        """/generate, greedy, exactly `tokens` unless `params` says otherwise."""
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, **fields.pop("params", {})}
        body = {"input_ids": ids, "sampling_params": params, **fields}
        return await self.ask("/generate", body, limit_s=limit_s)

    async def replica(self) -> dict[str, Any]:
        """What /slo/status tells of the first replica; empty if it does not answer."""
        answer = await self.ask("/slo/status", None, limit_s=20)
        return answer.body["replicas"][0] if answer.status == 200 and answer.body.get("replicas") else {}

    async def alive(self) -> bool:
        """Whether a plain request is served; the second one, if the first met a connection that was closed as idle."""
        for _ in range(2):
            answer = await self.generate([11, 12, 13], 2, limit_s=60)
            if answer.status:
                break
        return answer.status == 200

    async def calm(self) -> dict[str, Any]:
        """Wait until nobody is in the server any more; what /slo/status tells then, or last."""
        seen, end = {}, time.monotonic() + CALM_S
        while time.monotonic() < end:
            seen = await self.replica()
            now = seen.get("now") or {}
            if seen and not now.get("running") and not sum((now.get("queued") or {}).values()):
                return seen
            await asyncio.sleep(1)
        return seen

    async def stream(self, body: dict[str, Any], events: int) -> AsyncIterator[bytes]:
        """Lines of a streamed /generate; hangs up after so many."""
        async with self.session.post(self.url + "/generate", json={**body, "stream": True}) as answer:
            async for line in answer.content:
                if line.startswith(b"data:"):
                    yield line
                    events -= 1
                if events <= 0:
                    return


@dataclass
class Serving:
    """A running server."""

    url: str
    log: Path
    launcher: psutil.Process

    def processes(self) -> dict[str, psutil.Process]:
        """By role: launcher, scheduler, detokenizer, trainer, and what else there is by number."""
        found = {"launcher": self.launcher}
        with contextlib.suppress(psutil.NoSuchProcess):
            for n, process in enumerate(self.launcher.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found[_role(process, n)] = process
        return found

    def held(self) -> dict[str, dict[str, float]]:
        """Memory (MiB), descriptors and threads of each process."""
        figures = {}
        for role, process in self.processes().items():
            with contextlib.suppress(psutil.Error):
                figures[role] = {
                    "rss_mib": round(process.memory_info().rss / 2**20, 1),
                    "descriptors": process.num_fds(),
                    "threads": process.num_threads(),
                }
        return figures

    def gone(self, within_s: float) -> bool:
        """Whether the server ends by itself in that time, all its processes with it."""
        mine = list(self.processes().values())
        _, left = psutil.wait_procs(mine, timeout=within_s)
        return not [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def told(self, text: str) -> bool:
        """Whether the log has this text."""
        return text in self.log.read_text(errors="replace")


def _role(process: psutil.Process, n: int) -> str:
    line = " ".join(process.cmdline())
    for role in ("scheduler", "detokenizer"):
        if f"sglang::{role}" in line:
            return role
    if "estimator" in line:
        return "trainer"
    return "tracker" if "resource_tracker" in line else f"other {n}"


@contextmanager
def serving(kind: str, flags: Sequence[str], log: Path) -> Iterator[Serving]:
    """A server of ours ("slo") or SGLang's own ("stock"), taken down in the end."""
    with servers.server(kind, flags, log) as url:
        port = url.rsplit(":", 1)[1]
        mine = psutil.Process().children()
        launcher = next(p for p in mine if p.is_running() and port in p.cmdline())
        yield Serving(url, log, launcher)
