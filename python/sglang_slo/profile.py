"""`python -m sglang_slo.profile`: measures how long a server's iterations take and writes the latency
profile.

python -m sglang_slo.profile --out h200.json --model-path M [any SGLang flag] starts it, measures, stops it
python -m sglang_slo.profile --out h200.json --url http://host:30000 asks one that is serving

A server that is started measures itself as it would at its own start, only longer. One that is serving is not
disturbed: it is asked for the model that it has fitted to its traffic, which knows no shapes but those.
The file goes to `--slo-profile`, and into the twin (`profile:` of a workload).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_slo.config import SloConfig
from sglang_slo.core.latency import VERSION, Coefficients, LatencyModel, ProfileError
from sglang_slo.measuring import MEASURE_ENV, describe

PROG = "python -m sglang_slo.profile"
ANSWER_S = 10.0  # a server that serves answers within


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args, server_flags = _flags(list(sys.argv[1:] if argv is None else argv))
    out = Path(args.out).absolute()
    try:
        model = of_running(args.url) if args.url else of_started(server_flags, out, args.seconds)
    except (ProfileError, OSError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 1
    model.save(out)
    print(describe(model))
    print(f"written: {out}")
    return 0


def _flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog=PROG, allow_abbrev=False, description=__doc__, add_help=True)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", metavar="FILE", required=True, help="where the profile goes (JSON)")
    parser.add_argument("--url", help="a running server; without it one is started with the other flags")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to measure (default: 20)")
    args, rest = parser.parse_known_args(argv)
    if not Path(args.out).absolute().parent.is_dir():
        parser.error(f"--out: need a file in a folder that exists, got {args.out}")
    if not 1 <= args.seconds <= 600:
        parser.error(f"--seconds: need 1 to 600, got {args.seconds:g}")
    if args.url and rest:
        parser.error(f"--url: a running server has its flags already, got {rest[0]}")
    if args.url and not args.url.startswith(("http://", "https://")):
        parser.error(f"--url: need http://host:port, got {args.url}")
    unknown = [flag for flag in rest if flag.startswith("--slo-")]
    if unknown:
        parser.error(f"{unknown[0]}: measuring depends on SGLang's flags only")
    return args, rest


def of_started(server_flags: Sequence[str], out: Path, seconds: float) -> LatencyModel:
    """Start an engine with these flags of SGLang, let its scheduler measure, and stop it.

    Raises ProfileError if no profile came out of it.
    """
    from sglang_slo.launch_server import with_defaults

    SloConfig().to_env()
    os.environ[MEASURE_ENV] = json.dumps({"out": str(out), "seconds": seconds})
    out.unlink(missing_ok=True)

    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    engine = Engine(server_args=prepare_server_args(with_defaults(server_flags)))
    engine.shutdown()
    if not out.exists():
        raise ProfileError(f"profile {out}: the server started but measured nothing (see its log above)")
    return LatencyModel.load(out)


def of_running(url: str) -> LatencyModel:
    """The model that a serving replica has fitted to its traffic. Raises ProfileError, OSError."""
    with urllib.request.urlopen(f"{url.rstrip('/')}/slo/status", timeout=ANSWER_S) as answer:
        try:
            status = json.load(answer)
        except ValueError as error:
            raise ProfileError(f"{url}/slo/status: need JSON, got something else: {error}") from error
    return from_status(status, url)


def from_status(status: Any, url: str) -> LatencyModel:
    """A profile from the JSON of `/slo/status`: the first replica's. Raises ProfileError."""
    try:
        now = status["replicas"][0]["now"]
        latency = now["latency"]
        raw = {
            "version": VERSION,
            "coefficients": {name: latency[name] for name in Coefficients.__dataclass_fields__},
            "margin_extend": latency["margin_extend"],
            "margin_decode": latency["margin_decode"],
            "name": url,
            "kv_capacity_tokens": int(now["kv"]["capacity"]),
            "measured": True,
            "meta": {"fit": {name: latency[name] for name in ("drift", "samples", "refits")}},
        }
    except (LookupError, TypeError, ValueError) as error:
        raise ProfileError(f"{url}/slo/status: no latency model in its answer ({error!r})") from error
    return LatencyModel.from_dict(raw, url)


if __name__ == "__main__":
    sys.exit(main())
