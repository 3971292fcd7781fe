"""Reads the output folder of scripts/gpu/run.sh and sums up its runs: median and range over the rounds of an arm."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Getter = Callable[[dict[str, Any]], float | None]


class ResultsError(ValueError):
    """A folder of results that cannot be used; the message names the file and what was expected."""


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some runs' values, and how many runs there were."""

    mid: float
    low: float
    high: float
    runs: int

    def text(self, digits: int = 3) -> str:
        """`median [low, high]`."""
        if self.runs == 1:
            return f"{self.mid:.{digits}f} (1 run)"
        return f"{self.mid:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of the values that are there; None if none is."""
    there = [float(v) for v in values if v is not None]
    return Spread(median(there), min(there), max(there), len(there)) if there else None


@dataclass(frozen=True)
class Results:
    """An output folder. `runs` gives the saved runs of a part."""

    folder: Path
    status: dict[str, Any]

    @staticmethod
    def read(folder: Path) -> Results:
        """Raises ResultsError if `folder` holds no status.json of a run."""
        try:
            status = json.loads((folder / "status.json").read_text())
            status["check"]["environment"]["device"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultsError(
                f"{folder / 'status.json'}: need the status file of scripts/gpu/run.sh ({error!r})"
            ) from error
        return Results(folder, status)

    @property
    def environment(self) -> dict[str, Any]:
        """What was measured on."""
        return dict(self.status["check"]["environment"])

    def runs(self, part: str) -> list[dict[str, Any]]:
        """The runs of a part, in the order of their names; raises ResultsError for a file that is no JSON."""
        found = []
        for path in sorted((self.folder / part).glob("*.json")):
            try:
                found.append({"name": path.stem, **json.loads(path.read_text())})
            except (ValueError, TypeError) as error:
                raise ResultsError(f"{path}: need a JSON object ({error})") from error
        return found

    def of(self, part: str, arm: str, get: Getter, level: str | None = None) -> Spread | None:
        """Spread of `get` over the rounds of one arm (of part c: at one load level)."""
        runs = [r for r in self.runs(part) if r.get("arm") == arm and r.get("level") == level]
        return spread(map(get, runs))

    def arms(self, part: str) -> list[str]:
        """Arms with runs in a part; stock first, ours last."""
        names = {r["arm"] for r in self.runs(part) if "arm" in r}
        return sorted(names, key=lambda name: (name != "stock", name != "tuned", name))

    def levels(self) -> list[tuple[str, float]]:
        """(level, load) of part c, in order of load."""
        return sorted({(r["level"], r["load"]) for r in self.runs("mix")}, key=lambda pair: pair[1])


def figure(*path: str, scale: float = 1.0) -> Getter:
    """A getter of `run[path...] * scale`; None where a step is missing, inf for null (what never came)."""

    def get(run: dict[str, Any]) -> float | None:
        value: Any = run
        for step in path:
            if not isinstance(value, dict) or step not in value:
                return None
            value = value[step]
        if value is None:
            return math.inf
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return value * scale if number else None

    return get


def counted(pattern: str) -> Getter:
    """A getter of the sum of a run's counters whose name matches."""

    def get(run: dict[str, Any]) -> float | None:
        counters = run.get("counters") or {}
        hits = [value for name, value in counters.items() if re.search(pattern, name)]
        return sum(hits) if hits else None

    return get


def idle_share(run: dict[str, Any]) -> float | None:
    """Share of the run in which no forward pass was on the device; None where SGLang did not time them."""
    busy_s, seconds = run.get("device_busy_s"), run.get("seconds")
    return max(1 - busy_s / seconds, 0.0) if busy_s and seconds else None


def ratio(above: Spread | None, below: Spread | None) -> float | None:
    """Ratio of the medians."""
    return above.mid / below.mid if above and below and below.mid else None


def find(value: Any, word: str) -> dict[str, float]:
    """Numbers anywhere in `value` under a key that contains `word`, by that key."""
    if isinstance(value, list):
        return {k: v for item in value for k, v in find(item, word).items()}
    if not isinstance(value, dict):
        return {}
    found: dict[str, float] = {}
    for key, inner in value.items():
        if word in key and isinstance(inner, int | float):
            found[key] = float(inner)
        found.update(find(inner, word))
    return found
