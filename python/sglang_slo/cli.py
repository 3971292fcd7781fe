"""The `sglang-slo` command: one word for each thing the package does, each also a module of its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "serve": ("sglang_slo.launch_server", "start a server; every SGLang flag and every --slo-* flag"),
    "twin": ("sglang_slo.twin.__main__", "SGLang's real scheduler in virtual time: compare, plan, report"),
    "profile": (
        "sglang_slo.profile",
        "measure how long a server's iterations take, for --slo-profile and the twin",
    ),
    "goodput": (
        "sglang_slo.goodput",
        "find the highest rate at which a class of a live server keeps its target",
    ),
    "estimator": ("sglang_slo.estimator.__main__", "train and check the predictor of output lengths"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `sglang-slo COMMAND ...`. Without a known command: the list of them, and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        module = importlib.import_module(COMMANDS[argv[0]][0])
        sys.argv = [f"sglang-slo {argv[0]}", *argv[1:]]
        status = module.main(argv[1:])
        if status:
            raise SystemExit(status)
        return
    asked = bool(argv) and argv[0] in ("-h", "--help")
    out = sys.stdout if asked else sys.stderr
    print("usage: sglang-slo COMMAND ...\n", file=out)
    for name, (_, meaning) in COMMANDS.items():
        print(f"  {name:10} {meaning}", file=out)
    raise SystemExit(0 if asked else 2)
