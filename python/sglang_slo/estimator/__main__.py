"""`python -m sglang_slo.estimator train|eval|show`: length models from files, by hand.

train --data FILE.jsonl --out FOLDER     fit a model that a server (`--slo-model-dir FOLDER`) starts from
eval  --data FILE.jsonl [--json]         cross-validate by prompt, with a calibration plot
show  FOLDER_OR_FILE [--json]            what a stored model was fitted on, and whether it can be used
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sglang_slo.estimator import evaluate, features, store, training
from sglang_slo.estimator.data import DataError, read


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 with a message for input that cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (DataError, store.StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_slo.estimator", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(required=True, metavar="train|eval|show")
    train = commands.add_parser("train", help="fit a model from a file and store it")
    train.add_argument("--data", type=Path, required=True, metavar="FILE.jsonl")
    train.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    train.set_defaults(run=_train)
    judge = commands.add_parser("eval", help="cross-validate by prompt")
    judge.add_argument("--data", type=Path, required=True, metavar="FILE.jsonl")
    judge.add_argument("--folds", type=_folds, default=evaluate.FOLDS, help="2 to 20 (default: %(default)s)")
    judge.add_argument("--plot", type=Path, default=Path("out/length-calibration.png"), metavar="FILE.png")
    judge.set_defaults(run=_eval)
    show = commands.add_parser("show", help="describe a stored model")
    show.add_argument("model", type=Path, metavar="FOLDER_OR_FILE")
    show.set_defaults(run=_show)
    for command in (train, judge):
        command.add_argument("--seed", type=int, default=0)
    for command in (train, judge, show):
        command.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    return parser


def _folds(text: str) -> int:
    if not text.isdigit() or not 2 <= int(text) <= 20:
        raise argparse.ArgumentTypeError(f"need a whole number from 2 to 20, got {text!r}")
    return int(text)


def _train(options: argparse.Namespace) -> int:
    data = read(options.data)
    if len(data.lengths_tokens) < training.MIN_ROWS:
        raise DataError(
            f"{options.data}: need at least {training.MIN_ROWS} rows, got {len(data.lengths_tokens)}"
        )
    saved = training.offline(data.rows, data.lengths_tokens, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    store.save(options.out / store.CANDIDATE, saved)
    store.promote(options.out)
    _print({"model": str(options.out / store.CURRENT), **_described(saved)}, options.json)
    return 0


def _eval(options: argparse.Namespace) -> int:
    data = read(options.data)
    result = evaluate.cross_validate(data, options.seed, options.folds)
    evaluate.plot(result, options.plot)
    figures = {**evaluate.report(data, result), "plot": str(options.plot), "seed": options.seed}
    _print(figures, options.json)
    return 0


def _show(options: argparse.Namespace) -> int:
    path = options.model / store.CURRENT if options.model.is_dir() else options.model
    saved = store.load(path)
    _print({"model": str(path), "bytes": path.stat().st_size, **_described(saved)}, options.json)
    return 0


def _described(saved: store.Saved) -> dict[str, Any]:
    model = saved.model
    return {
        "features_version": features.VERSION,
        "rows": model.rows,
        "rounds": model.rounds,
        "calibration_rows": len(saved.logs),
        **saved.about,
        "top_features": {name: round(share, 4) for name, share in model.top_features()},
    }


def _print(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures))
        return
    for key, value in figures.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, inner in value.items():
                shown = (
                    "  ".join(f"P {p}: {v:.4g}" for p, v in inner.items())
                    if isinstance(inner, dict)
                    else inner
                )
                print(f"  {name:24} {shown}")
        else:
            print(f"{key:26} {value:.4f}" if isinstance(value, float) else f"{key:26} {value}")
    if "mae_tokens" in figures:
        print("lengths in tokens: characters / 4")


if __name__ == "__main__":
    sys.exit(main())
