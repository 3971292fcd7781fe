"""The pieces of the results page: each runs what it needs in the twin and returns Markdown, with its plots.

    attainment   share of requests within limits against load: ours, best stock, stock defaults, upper bounds;
                 classes, every measure and what got worse at the workload's main load
    capacity     highest load that keeps 90 % of requests within limits
    parts        ours with each part switched off
    lengths      ours with each predictor of output lengths

Runs are kept by the twin's cache, so a piece that was stopped goes on where it was. Best stock is searched
anew for each workload and load, on the first seed, and then run on all seeds.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sglang_slo.cpu.demo_model import cache_dir
from sglang_slo.twin import plot, runs
from sglang_slo.twin.bound.upper_bound import bound
from sglang_slo.twin.capacity import capacity
from sglang_slo.twin.compare import PARTS, best_stock
from sglang_slo.twin.predictors import PREDICTORS
from sglang_slo.twin.result.report import (
    classes_table,
    markdown_table,
    measures_table,
    share_with_spread,
    spread,
    what_got_worse,
    with_spread,
)
from sglang_slo.twin.result.run_result import RunResult
from sglang_slo.twin.runs import Spec, run_all, show_progress

OURS, DEFAULTS = "ours", "stock defaults"
BOUND_NAMES = {"p99": "upper bound", "every": "upper bound, no gap ever over its limit"}


@dataclass(frozen=True)
class Scene:
    """A workload as the page shows it: loads, the main one among them, and a requests' limit for quick looks."""

    workload: str
    loads: tuple[float, ...]
    main_load: float
    title: str
    max_requests: int | None = None


SCENES = (
    Scene("mix", (0.5, 1.0, 1.5, 2.0), 1.0, "Chat and code with long summaries behind them, 8B on an H200"),
    Scene("reason", (0.25, 0.5, 1.0), 0.5, "Long outputs of undeclared length, 13B on an A100: KV is short"),
    Scene("agent", (0.5, 1.0, 1.5), 1.0, "Conversations that share long prefixes, 8B on an H200"),
    Scene("chat70b", (0.25, 0.5, 1.0), 0.5, "Chat beside long summaries on a 70B model, H200"),
)


@dataclass(frozen=True)
class Setup:
    """What all pieces share: seeds, processes, where traces lie, where plots go."""

    seeds: tuple[int, ...]
    jobs: int | None
    data: str | None
    plots: Path
    grid: str = "usual"  # extent of the stock grid

    def spec(self, scene: Scene, load: float, seed: int) -> Spec:
        """Stock defaults on a scene."""
        return Spec(
            scene.workload,
            "stock",
            load=load,
            seed=seed,
            max_requests=scene.max_requests,
            data=self.data,
            name=DEFAULTS,
        )


def attainment(scene: Scene, setup: Setup) -> str:
    """Attainment against load, and a closer look at the main load."""
    by_load = {load: _contenders(scene, load, setup) for load in scene.loads}
    upper = {rule: {load: _bounds(scene, load, setup, rule) for load in scene.loads} for rule in BOUND_NAMES}
    curves: dict[str, plot.Curve] = {OURS: {}, "best stock": {}, DEFAULTS: {}}
    rows = []
    for load, (named, setting) in by_load.items():
        shares = {name: [r.attainment for r in results] for name, results in named.items()}
        for name, values in shares.items():
            curves[name][load] = values
        best_possible = upper["p99"][load]
        reached = spread(shares[OURS])[1] / max(spread(best_possible)[1], 1e-9)
        cells = [share_with_spread(shares[name]) for name in curves]
        bounds = [share_with_spread(upper[rule][load]) for rule in BOUND_NAMES]
        rows.append([f"{load:g}", *cells, setting, *bounds, f"{reached:.3f}"])
    head = ["load", *curves, "its setting", "bound", "bound, every gap", "ours / bound"]
    image = setup.plots / f"{scene.workload}-attainment.png"
    plot.attainment_against_load(
        curves,
        {BOUND_NAMES[rule]: values for rule, values in upper.items()},
        f"{scene.workload}: {len(setup.seeds)} seeds",
        image,
    )
    main, _ = by_load[scene.main_load]
    firsts = [results[0] for results in main.values()]
    images = [image, *plot.compare(firsts, setup.plots)]
    return "\n\n".join(
        [
            markdown_table(head, rows),
            *(f"![{path.stem}]({setup.plots.name}/{path.name})" for path in images),
            f"At load {scene.main_load:g}, by class:",
            classes_table(main),
            "Every measure:",
            measures_table(main),
            f"What got worse at load {scene.main_load:g}:",
            _worse(main),
            "What stands behind it at each load. Every gap kept: attainment if the limit held for each gap, not only "
            "for the 99th percentile of a request's gaps. Longest pause: the longest gap of each request, its 99th "
            "percentile and its maximum over requests. KV when saturated: mean share in use over the time in which "
            "somebody waits:",
            _behind({load: named for load, (named, _) in by_load.items()}),
        ]
    )


def _behind(by_load: dict[float, dict[str, list[RunResult]]]) -> str:
    """The longest pauses, and KV in use while somebody waits."""
    rows = []
    for load, named in by_load.items():
        for name, results in named.items():
            pauses = [r.requests.max_gap_s[r.requests.finished] for r in results]
            p99 = with_spread([float(np.quantile(p, 0.99)) if len(p) else 0.0 for p in pauses], " s")
            longest = with_spread([float(p.max(initial=0.0)) for p in pauses], " s")
            every = share_with_spread([_every_gap_kept(r) for r in results])
            kv = share_with_spread([_saturated_kv(r) for r in results])
            rows.append([f"{load:g}", name, every, p99, longest, kv])
    head = ["load", "", "every gap kept", "longest pause, p99", "longest pause, maximum", "KV when saturated"]
    return markdown_table(head, rows)


def _every_gap_kept(result: RunResult) -> float:
    """Share of requests that had no gap over their limit at all, and kept their other limits."""
    return float(result.measures()["attainment_by_rule"]["every"])


def _saturated_kv(result: RunResult) -> float:
    """Mean share of KV in use over the iterations that left somebody waiting; 0 if there was none."""
    its = result.iterations
    seconds = its.duration_s * (its.waiting > 0)
    used = float((its.kv_used_tokens * seconds).sum()) / max(result.kv_capacity_tokens, 1)
    return used / float(seconds.sum()) if seconds.any() else 0.0


def capacities(scene: Scene, setup: Setup) -> str:
    """Capacity at 90 %, on the first seed, of ours, of stock defaults and of stock's best setting."""
    base = setup.spec(scene, scene.main_load, setup.seeds[0])
    grid = best_stock(base, setup.jobs, setup.grid)
    best = max(grid, key=lambda r: (r.attainment, r.goodput_rps))
    argv = tuple(best.settings["argv"])
    rows = []
    found = {}
    for name, spec in (
        (OURS, replace(base, scheduler="slo", name=OURS)),
        (f"best stock at load {scene.main_load:g}: {_setting(best)}", replace(base, argv=argv)),
        (DEFAULTS, base),
    ):
        found[name] = capacity(spec)
        c = found[name]
        rows.append([name, f"{c.load:.3f}", f"{c.above:.3f}", f"{c.goodput_rps:.2f}"])
    return markdown_table(["", "load kept", "missed at", "goodput there, req/s"], rows)


def parts(scene: Scene, setup: Setup) -> str:
    """Ours with each part off at the main load, all seeds."""
    whole = {OURS: ()} | dict(PARTS)
    specs = [
        replace(setup.spec(scene, scene.main_load, seed), scheduler="slo", argv=off, name=name)
        for name, off in whole.items()
        for seed in setup.seeds
    ]
    results = run_all(specs, setup.jobs, show_progress)
    count = len(setup.seeds)
    grouped = {name: results[i * count : (i + 1) * count] for i, name in enumerate(whole)}
    reference = [r.attainment for r in grouped[OURS]]
    rows = []
    for name, mine in grouped.items():
        values = [r.attainment for r in mine]
        difference = spread(values)[1] - spread(reference)[1]
        preempted = sum(r.retractions for r in mine) / count
        cells = [share_with_spread(values), "" if name == OURS else f"{difference:+.3f}", f"{preempted:.1f}"]
        rows.append([name, *cells])
    return markdown_table([f"load {scene.main_load:g}", "attainment", "change", "preemptions"], rows)


def lengths(scene: Scene, setup: Setup) -> str:
    """Ours with each predictor at the main load, all seeds; the shifted one has learned from another workload."""
    elsewhere = "reason" if scene.workload == "mix" else "mix"
    with tempfile.TemporaryDirectory() as folder:
        learned = ("--slo-model-dir", folder)
        school = replace(
            setup.spec(scene, 1.0, setup.seeds[0]), workload=elsewhere, scheduler="slo", argv=learned
        )
        run_all([replace(school, name=f"learning from {elsewhere}")], 1, show_progress, keep=False)
        specs = [
            replace(
                setup.spec(scene, scene.main_load, seed),
                scheduler="slo",
                argv=learned if name == "shifted" else (),
                predictor=name,
                name=name,
            )
            for name in PREDICTORS
            for seed in setup.seeds
        ]
        results = run_all(specs, setup.jobs, show_progress)
    count = len(setup.seeds)
    rows = []
    for i, name in enumerate(PREDICTORS):
        mine = results[i * count : (i + 1) * count]
        tax = spread([r.measures()["recompute_tax"] for r in mine])[1]
        rows.append(
            [
                f"{name} (from {elsewhere})" if name == "shifted" else name,
                share_with_spread([r.attainment for r in mine]),
                f"{sum(r.retractions for r in mine) / count:.1f}",
                f"{tax:.2f}",
            ]
        )
    head = [f"load {scene.main_load:g}", "attainment", "preemptions", "share of prefill done again"]
    return markdown_table(head, rows)


PIECES: dict[str, Callable[[Scene, Setup], str]] = {
    "attainment": attainment,
    "capacity": capacities,
    "parts": parts,
    "lengths": lengths,
}


def _contenders(scene: Scene, load: float, setup: Setup) -> tuple[dict[str, list[RunResult]], str]:
    """Results per seed of ours, best stock and stock defaults, and the best setting's name."""
    grid = best_stock(setup.spec(scene, load, setup.seeds[0]), setup.jobs, setup.grid)
    best = max(grid, key=lambda r: (r.attainment, r.goodput_rps))
    kinds = (
        (OURS, "slo", ()),
        ("best stock", "stock", tuple(best.settings["argv"])),
        (DEFAULTS, "stock", ()),
    )
    specs = [
        replace(setup.spec(scene, load, seed), scheduler=kind, argv=argv, name=name)
        for name, kind, argv in kinds
        for seed in setup.seeds
    ]
    results = run_all(specs, setup.jobs, show_progress)
    count = len(setup.seeds)
    named = {name: results[i * count : (i + 1) * count] for i, (name, _, _) in enumerate(kinds)}
    return named, _setting(best)


def _setting(result: RunResult) -> str:
    return result.scheduler.removeprefix("stock ")


def _worse(main: dict[str, list[RunResult]]) -> str:
    lines = []
    for other in ("best stock", DEFAULTS):
        found = what_got_worse(main[OURS], main[other])
        lines += [f"- against {other}: {line}" for line in found] or [f"- against {other}: nothing"]
    return "\n".join(lines)


def _bounds(scene: Scene, load: float, setup: Setup, rule: str) -> list[float]:
    return [_bound(setup.spec(scene, load, seed), rule) for seed in setup.seeds]


def _bound(spec: Spec, rule: str) -> float:
    """The bound, kept on disk beside the runs: its key is that of the run and the bound's own source."""
    folder = Path(plot.__file__).parent
    source = b"".join(
        (folder / f"{n}.py").read_bytes() for n in ("bound", "least_work", "prefixes", "relaxation")
    )
    name = hashlib.sha256(source + f"{runs.key(spec)} {rule}".encode()).hexdigest()[:32]
    path = cache_dir() / "bounds" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(bound(spec.requests(), rule).to_json())
        partial.replace(path)
    return float(json.loads(path.read_text())["attainment"])
