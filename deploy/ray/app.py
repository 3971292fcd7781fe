"""Ray Serve in front of ordinary servers: each request to a replica that can still keep its limits.

    python deploy/ray/start.py --port 8000 --servers http://10.0.0.1:30000 http://10.0.0.2:30000
    python deploy/ray/start.py --port 8000 --replicas 2 -- ./scripts/serve.sh

    client -> Ingress (any path) -> DeadlineRouter (Ray's request router: `choice.py`) -> Server (an actor beside each server)

A `Server` asks its server for `/slo/status` twice a second, by Ray's own routing statistics. It owns its server where no URLs
are given: starts it, and is replaced by Ray, server and all, when that has ended.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

import status as told
from child import end, started
from choice import Choice
from relay import Begun, Lost, NobodyLeftError, Part, Ticket, answered, passed_on, relay
from said import read

POLL_S = 0.5
ASK_S = 5.0  # for a status; later than that a server counts as gone
SEEN = 512  # ids of requests, told back
AT_ONCE = 10_000  # the servers have queues of their own, which know the deadlines


class DeadlineRouter(RequestRouter):
    """Ray's request router with `Choice` in it. `policy`: `deadline`, or `round_robin` to compare."""

    # Ray asks a replica how many it has before it sends; one that answers late is passed over, and the choice with it
    queue_len_response_deadline_s = 2.0
    max_queue_len_response_deadline_s = 10.0

    def initialize_state(self, policy: str = "deadline") -> None:
        """From the configuration of the deployment."""
        self._policy, self._turn, self._choice = policy, 0, Choice()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, best first."""
        names = {r.replica_id.unique_id: r for r in candidate_replicas}
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        ticket: Ticket = pending_request.args[0]
        if self._policy == "round_robin":
            order = [name for name in sorted(names) if name not in ticket.tried] or sorted(names)
            self._turn += 1
            return [[names[order[self._turn % len(order)]]]]
        now_s = time.monotonic()
        snapshots = {name: told.snapshot(r.routing_stats) for name, r in names.items()}
        order = self._choice.order(ticket.ask, snapshots, ticket.tried, now_s)
        if not order:  # all are gone or were tried: perhaps one has come back
            return [candidate_replicas]
        self._choice.sent(ticket.ask, order[0], now_s)
        return [[names[name]] for name in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Ray sent it there, which is the first of our order unless that was full."""
        if self._policy == "deadline" and pending_request.args:
            self._choice.sent(pending_request.args[0].ask, replica_id.unique_id, time.monotonic())


class Server:
    """One ordinary server, or the way to it."""

    def __init__(self, urls: list[str], command: list[str]) -> None:
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._process: subprocess.Popen[bytes] | None = None
        if urls:
            self._url = urls[getattr(context.rank, "rank", context.rank) % len(urls)].rstrip("/")
        else:
            self._process, self._url = started(command)
        self._session: aiohttp.ClientSession | None = None
        self._passed: deque[str] = deque(maxlen=SEEN)  # ids of requests that were sent on
        self._told: dict[str, Any] = {}

    async def forward(self, ticket: Ticket) -> AsyncIterator[Part]:
        """The server's answer, in parts."""
        self._passed.append(ticket.ask.id)
        async for part in relay(self._http(), self._url, self._name, ticket):
            if isinstance(part, Lost):
                self._told = told.GONE
            yield part

    async def record_routing_stats(self) -> dict[str, Any]:
        """Ray asks every POLL_S; what the router sees as `routing_stats`."""
        passed = tuple(self._passed)  # before the question, so that its answer contains them
        try:
            limit = aiohttp.ClientTimeout(total=ASK_S)
            async with self._http().get(self._url + "/slo/status", timeout=limit) as answer:
                self._told = told.plain(await answer.json(), passed)
        except (aiohttp.ClientError, OSError, ValueError, asyncio.TimeoutError):
            self._told = told.GONE
        return self._told

    def check_health(self) -> None:
        """A server of its own that has ended is replaced, with this actor; one given by its URL may come back."""
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"the server ended with status {self._process.returncode}")

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            end(self._process)

    def _http(self) -> aiohttp.ClientSession:
        """One session, made on the loop on which it is used. No connection is kept: a stale one looks like a lost replica."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
            )
        return self._session


class Ingress:
    """Where clients come in: reads what matters of a request, and passes it on whole."""

    def __init__(self, servers: Any, chars_per_token: float) -> None:
        self._servers = servers.options(stream=True)
        self._chars_per_token = chars_per_token

    async def __call__(self, request: Request) -> Response:
        """One request."""
        body = await request.body()
        path = request.scope["path"].removeprefix(request.scope.get("root_path", "").rstrip("/"))
        path += f"?{request.url.query}" if request.url.query else ""
        ask = read(uuid.uuid4().hex, dict(request.headers), body, self._chars_per_token)
        ticket = Ticket(ask, request.method, path, passed_on(list(request.headers.items())), body)
        try:
            begun, rest = await answered(lambda t: aiter(self._servers.forward.remote(t)), ticket)
        except NobodyLeftError as error:
            told_so = {
                "error": {"message": f"no replica answered: {error}", "type": "no_replica", "code": 503}
            }
            return JSONResponse(told_so, status_code=503, headers={"retry-after": "1"})
        response = StreamingResponse(_bytes(rest), begun.status)
        response.raw_headers = [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in begun.headers]
        return response


async def _bytes(rest: AsyncIterator[Part]) -> AsyncIterator[bytes]:
    """The rest of an answer. The actor itself may die meanwhile: then Ray raises, and the connection breaks off."""
    try:
        async for part in rest:
            assert not isinstance(part, Begun | Lost)
            yield part
    finally:  # a client that goes away takes its request along
        getattr(rest, "cancel", lambda: None)()


def build(args: dict[str, Any]) -> Any:
    """The application. `servers`: URLs; without, `replicas` and `command`: how many to start, and how.

    `policy`: see DeadlineRouter. `chars_per_token`: of prompts, on average.
    """
    urls = list(args.get("servers") or ())
    count = len(urls) or int(args.get("replicas", 1))
    routed = RequestRouterConfig(
        request_router_class=DeadlineRouter,
        request_router_kwargs={"policy": args.get("policy", "deadline")},
        request_routing_stats_period_s=POLL_S,
        request_routing_stats_timeout_s=2 * ASK_S,
    )
    server = serve.deployment(
        Server,
        name="Server",
        num_replicas=count,
        max_ongoing_requests=AT_ONCE,
        request_router_config=routed,
        health_check_period_s=2,
        health_check_timeout_s=60,
        ray_actor_options=args.get("actor", {"num_cpus": 0}),
    )
    ingress = serve.deployment(
        Ingress, name="Ingress", max_ongoing_requests=AT_ONCE, ray_actor_options={"num_cpus": 0}
    )
    bound = server.bind(urls, list(args.get("command") or ()))
    return ingress.bind(bound, float(args.get("chars_per_token", 4.0)))
