"""Draws results/first_look.png from results/first_look.json: attainment of ours and of stock SGLang by workload."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent / "results"
ARMS = {
    "stock": ("stock SGLang, defaults", "#b9bec9"),
    "best_stock": ("best stock setting tried", "#7b8496"),
    "ours": ("sglang-slo", "#2a7de1"),
}


def main() -> None:
    """Write the picture."""
    rows = json.loads((FOLDER / "first_look.json").read_text())["rows"]
    figure, axes = plt.subplots(figsize=(8, 3.6))
    for k, (arm, (label, color)) in enumerate(ARMS.items()):
        places = [i + 0.27 * (k - 1) for i, row in enumerate(rows) if row[arm] is not None]
        bars = axes.bar(
            places, [row[arm] for row in rows if row[arm] is not None], 0.25, label=label, color=color
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    for i, row in enumerate(rows):
        axes.hlines(row["bound"], i - 0.42, i + 0.42, colors="black", linestyles="dotted", linewidth=1)
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylabel("requests with both limits met")
    axes.set_xlabel("workload and load; dotted: upper bound for any scheduler; no bar: not run")
    axes.set_ylim(0, 1.15)
    axes.legend(ncols=3, fontsize=8, frameon=False, loc="upper center")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(FOLDER / "first_look.png", dpi=130)


if __name__ == "__main__":
    main()
