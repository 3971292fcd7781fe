"""Flags that the twin's commands share, and how a command line becomes a `Spec`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sglang_slo.twin.predictors import PREDICTORS
from sglang_slo.twin.runs import Spec
from sglang_slo.twin.workloads import workload


def add_workload(parser: argparse.ArgumentParser) -> None:
    """What to run, on how many cores, and how to print it."""
    ready = ", ".join(workload.names())
    parser.add_argument(
        "--workload", required=True, metavar="NAME|FILE", help=f"a YAML file or one of {ready}"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("SGLANG_SLO_DATA"),
        help="a further folder where traces are looked for (default: $SGLANG_SLO_DATA)",
    )
    parser.add_argument("--load", type=float, default=1.0, help="multiplies every arrival rate (default: 1)")
    parser.add_argument(
        "--device",
        metavar="MODEL,SYSTEM[,tp=N][,quant=Q]|PROFILE",
        help="measured kernels of a model on a system, or a profile's name or file, in the place of the workload's",
    )
    parser.add_argument("--seed", type=int, help="in the place of the workload's own")
    parser.add_argument("--max-requests", type=int, help="in the place of the workload's own")
    parser.add_argument(
        "--predictor",
        choices=PREDICTORS,
        help="of output lengths, in the place of the workload's own; shifted: the model in --slo-model-dir, as it is",
    )
    parser.add_argument("--jobs", type=int, help="processes (default: one per core that has memory for it)")
    parser.add_argument("--json", action="store_true", help="one line of JSON per run instead of the table")
    parser.add_argument("--no-cache", action="store_true", help="run again what was run before")


def spec(args: argparse.Namespace, scheduler: str, argv: list[str], name: str = "") -> Spec:
    """The run that a command line asks for."""
    return Spec(
        workload=args.workload,
        scheduler=scheduler,
        argv=tuple(argv),
        load=args.load,
        seed=args.seed,
        max_requests=args.max_requests,
        data=str(args.data) if args.data else None,
        predictor=args.predictor,
        device=args.device,
        name=name,
    )


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """(--slo-* flags with their values, all the others)."""
    ours: list[str] = []
    others: list[str] = []
    target = others
    for word in argv:
        if word.startswith("--"):
            target = ours if word.startswith("--slo-") else others
        target.append(word)
    return ours, others
