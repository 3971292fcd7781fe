"""Writes benchmark/CAMPAIGN.md from what the parts found. Only figures of runs that were made stand in it."""

from __future__ import annotations

import platform
from collections import Counter
from typing import Any

from campaign.known import KNOWN
from campaign.script import Tally

HEAD = """# The soundness campaign

What was done to sglang-slo to break it, how often, what broke and what held. Written by `benchmark/campaign` from the
files of its runs; the same seed does the same to the scheduler again (`--help` says how to see a single finding again).
"""


def page(results: list[dict[str, Any]]) -> str:
    """The page's Markdown."""
    twins = [result for result in results if "tally" in result]
    parts = [HEAD, *([_twin(twins)] if twins else [])]
    parts += [_server(result) for result in results if "tally" not in result]
    known = _table(["input", "covered as a kind by"], [(what, f"`{test}`") for what, test in KNOWN.items()])
    return "\n".join([*parts, "## Inputs that once broke something", "", known, ""])


def _twin(runs: list[dict[str, Any]]) -> str:
    """One section for all seeds: what is counted is added up."""
    r = _together(runs)
    tally, seeds = r["tally"], ", ".join(str(run["seed"]) for run in runs)
    lines = [
        f"## The scheduler in virtual time, seed{'s' if len(runs) > 1 else ''} {seeds}",
        "",
        f"{_n(tally['arrived'])} requests in {_n(tally['worlds'])} worlds, {_n(tally['iterations'])} iterations with every "
        f"invariant checked in each; {_n(tally['finished'])} finished, {_n(tally['aborted'])} were given up by their clients "
        f"or refused. {r['cpu_s']:.0f} s of one core (Python {platform.python_version()}), "
        f"{r['cpu_s'] / tally['arrived'] * 1e3:.1f} ms a request. {_kinds(r['kinds'])}",
        "",
        *[line for run in runs if "note" in run for line in (run["note"], "")],
        _switched_on(r),
        "",
        _table(["done", "times"], [*_faults(tally["faults"]), *sorted(tally["commands"].items())]),
        "",
        _table(["taken out of the running batch", "times"], sorted(tally["preemptions"].items())),
        "",
        "Features in requests: "
        + (", ".join(f"{k} {_n(n)}" for k, n in sorted(tally["features"].items())) or "none")
        + ".",
        "",
        "### What broke",
        "",
        _table(["what", "times", "first under", "says"], _breaks(r["breaks"])) if r["breaks"] else "Nothing.",
        "",
    ]
    return "\n".join(lines)


def _together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The findings of several seeds as those of one."""
    tally = Tally()
    for run in runs:
        counts: dict[str, Any] = {
            k: Counter(v) if isinstance(v, dict) else v for k, v in run["tally"].items()
        }
        tally.add(Tally(**counts))
    return {
        "tally": vars(tally),
        "kinds": sum((Counter(run["kinds"]) for run in runs), Counter()),
        "cpu_s": sum(run["cpu_s"] for run in runs),
        "faults_tried": sum(run["faults_tried"] for run in runs),
        "breaks": [broken for run in runs for broken in run["breaks"]],
        **{name: sorted({one for run in runs for one in run[name]}) for name in ("entries", "inner")},
    }


def _kinds(kinds: dict[str, int]) -> str:
    told = {
        "lone": "one at a time",
        "crowded": "a few dozen at a time in a pool for a handful",
        "busy": "hundreds at a time in a pool for half of them",
    }
    return f"Of those of the soak {', '.join(f'{_n(kinds[k])} came {v}' for k, v in told.items() if kinds.get(k))}."


def _switched_on(r: dict[str, Any]) -> str:
    if not r["faults_tried"]:
        return "No faults were switched on; what clients and operators did:"
    inner = any(" inner " in name for name in r["tally"]["faults"])
    places = f"{len(r['entries'])} entries" + (f" and {len(r['inner'])} inner functions" if inner else "")
    return (
        f"{_n(r['faults_tried'])} faults switched on: exceptions in {places}, before and after what they do, once and "
        "always; and:"
    )


def _faults(faults: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(faults.items(), key=lambda pair: (pair[0].startswith("raise"), pair[0]))


def _breaks(breaks: list[dict[str, str]]) -> list[tuple[Any, ...]]:
    """One row for each kind and fault's function."""
    count = Counter((_kind(b), _where(b)) for b in breaks)
    rows = []
    for (kind, where), n in count.most_common():
        first = next(b for b in breaks if (_kind(b), _where(b)) == (kind, where))
        rows.append((kind, n, where, first["what"][:140].replace("|", "/").replace("\n", " ")))
    return rows


def _kind(b: dict[str, str]) -> str:
    return b["what"].split(":")[0]


def _where(b: dict[str, str]) -> str:
    return b["fault"] or "no fault"


def _server(r: dict[str, Any]) -> str:
    words = {True: "held", False: "BROKE", None: "not tried"}
    rows = [
        (c["name"], words[c["held"]], c["detail"].replace("|", "/").replace("\n", " ")) for c in r["checks"]
    ]
    took = f", {r['minutes']:.0f} minutes" if "minutes" in r else ""
    head = f"## A real server on a CPU, seed {r['seed']}{took}"
    note = [r["note"], ""] if "note" in r else []  # of runs that were put together
    return "\n".join([head, "", *note, _table(["what was done", "", "seen"], rows), ""])


def _table(head: list[str], rows: list[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_n(v) if isinstance(v, int) else str(v) for v in row) + " |" for row in rows]
    return "\n".join(lines)


def _n(value: int) -> str:
    return f"{value:,}"
