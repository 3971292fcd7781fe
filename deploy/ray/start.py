"""Starts Ray Serve on this machine with `app.py` in front of servers, and stays until it is ended.

python deploy/ray/start.py --servers http://127.0.0.1:30000 http://127.0.0.1:30001
python deploy/ray/start.py --replicas 2 -- /path/of/python -m sglang_slo.launch_server --model-path ...
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import ray
from ray import serve

from app import build

OBJECT_STORE_BYTES = 100 * 2**20  # nothing large goes through it


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--servers", nargs="+", metavar="URL", default=[], help="of servers that run already")
    parser.add_argument(
        "--replicas", type=int, default=1, help="how many servers to start, without --servers"
    )
    parser.add_argument(
        "--policy",
        nargs="+",
        choices=("deadline", "round_robin"),
        default=["deadline"],
        help="the first at /, any other at its name, to compare",
    )
    parser.add_argument("--chars-per-token", type=float, default=4.0, help="of prompts, on average")
    parser.add_argument("command", nargs="*", help="command of a server, after --")
    args = parser.parse_args()
    if bool(args.servers) == bool(args.command):
        parser.error("need either --servers or, after --, the command of a server")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ray.init(
        num_cpus=max(4, args.replicas),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parent)}},
    )
    serve.start(http_options={"host": args.host, "port": args.port})
    for i, policy in enumerate(args.policy):
        app = build({**vars(args), "policy": policy})
        serve.run(app, name=policy, route_prefix=f"/{policy}" if i else "/", blocking=False)
    print(f"[ray] http://{args.host}:{args.port}, policy {args.policy[0]}", flush=True)
    try:
        while True:
            signal.pause()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
