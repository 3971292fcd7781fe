"""Plots of a GPU visit: attainment and tails against load (part c), each run a dot and the medians a line."""

from __future__ import annotations

import math
from pathlib import Path

from gpu_results import Results
from gpu_tables import REPLAY

SHOWN = (("gpu_attainment", (0,)), ("gpu_tails", (4, 6)))  # file, columns of the table of part c


def plot(results: Results, folder: Path) -> list[Path]:
    """Write the pictures; none if part c has no runs."""
    levels = results.levels()
    if not levels:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for stem, columns in SHOWN:
        figure, axes = plt.subplots(1, len(columns), figsize=(5.5 * len(columns), 4), squeeze=False)
        for axis, column in zip(axes[0], columns, strict=True):
            name, get, _ = REPLAY[column]
            for arm in results.arms("mix"):
                spreads = [(load, results.of("mix", arm, get, level)) for level, load in levels]
                line = [(load, s.mid) for load, s in spreads if s and math.isfinite(s.mid)]
                drawn = axis.plot([x for x, _ in line], [y for _, y in line], label=arm)
                dots = [(r["load"], get(r)) for r in results.runs("mix") if r["arm"] == arm]
                dots = [(x, y) for x, y in dots if y is not None and math.isfinite(y)]
                axis.plot([x for x, _ in dots], [y for _, y in dots], "o", ms=4, color=drawn[0].get_color())
            axis.set_xlabel("load")
            axis.set_ylabel(name)
            if column == 0:
                axis.set_ylim(0, 1.02)
            else:
                axis.set_yscale("log")
            axis.legend()
        figure.suptitle(str(results.environment.get("gpu") or "no GPU"))
        figure.tight_layout()
        written.append(folder / f"{stem}.png")
        figure.savefig(written[-1], dpi=110)
        plt.close(figure)
    return written
