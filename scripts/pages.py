"""Writes the generated pages of docs/ from the code's own tables: flags, modes, metrics.

scripts/run.sh -- scripts/pages.py            writes them
scripts/run.sh -- scripts/pages.py --check    says which are out of date; exit status 1 if any is
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTE = "<!-- written by scripts/pages.py; do not edit -->"


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    old = [name for name, text in pages().items() if _read(DOCS / name) != text]
    if "--check" in argv:
        print("\n".join(f"docs/{name} is out of date: run scripts/pages.py" for name in old), file=sys.stderr)
        return int(bool(old))
    for name in old:
        (DOCS / name).write_text(pages()[name])
        print(f"written: docs/{name}")
    return 0


def pages() -> dict[str, str]:
    """Each page's name and text."""
    from sglang_slo.runtime.scheduler import flags
    from sglang_slo.settings_schema import schema

    modes = "# SGLang's flags and modes\n\n" + NOTE + "\n\n" + MODES + "\n" + flags.markdown()
    return {
        "flags.md": _flags(),
        "metrics.md": _metrics(),
        "modes.md": modes,
        "slo.schema.json": json.dumps(schema(), indent=1) + "\n",
    }


MODES = """*honoured*: works with the deadline scheduler. *refused*: the server does not start, and says why.
*stock scheduling*: the server runs, limits are read and judged, and SGLang's own scheduler decides, as the log and
`/slo/status` say.
"""
METRICS = """With `--enable-metrics` these stand in SGLang's own `/metrics`, beside `sglang:*`. Times are in seconds.
Every metric but `sglang_slo_http_requests_total` has SGLang's labels (`model_name`, `engine_type`, `tp_rank`, ...); others
are named below. Class names come from the server's settings, so their number is bounded.
"""


def _flags() -> str:
    from sglang_slo.config import settings

    lines = [
        "# Flags",
        "",
        NOTE,
        "",
        "Every setting is a flag `--slo-...` and a key of `--slo-config FILE` (YAML, without",
    ]
    lines += ["`slo-`); a flag beats the file. `--help` lists SGLang's own, all of which are taken."]
    lines += ["[slo.schema.json](slo.schema.json) is the file's JSON schema, for editors and checks.", ""]
    lines += ["| flag | accepted | default | meaning |", "|---|---|---|---|"]
    for f in settings():
        accepted = ", ".join(f.metadata["choices"] or ()) or _kind(str(f.type), f.metadata["low"])
        default = _shown(f.default)
        lines.append(
            f"| `--slo-{f.name.replace('_', '-')}` | {accepted} | {default} | {f.metadata['help']} |"
        )
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else f"{value}"


def _kind(annotation: str, low: float) -> str:
    if "bool" in annotation:
        return "on, off"
    kind = "whole number" if "int" in annotation else "number" if "float" in annotation else "text"
    return kind if kind == "text" or low == float("-inf") else f"{kind} from {low:g}"


def _metrics() -> str:
    from sglang_slo.observe import metric_names as metrics

    lines = ["# Metrics", "", NOTE, "", METRICS, "| metric | type | labels | meaning |", "|---|---|---|---|"]
    tables: dict[str, Mapping[str, Any]] = {
        "counter": metrics.COUNTERS | metrics.HTTP_COUNTERS,
        "histogram": metrics.HISTOGRAMS,
        "gauge": metrics.GAUGES,
    }
    for kind, table in tables.items():
        for name, (text, more) in table.items():
            labels = "slo_class" if kind == "histogram" else ", ".join(more)
            suffix = "_total" if kind == "counter" else ""
            lines.append(f"| `{metrics.PREFIX}{name}{suffix}` | {kind} | {labels} | {text} |")
    return "\n".join(lines) + "\n"


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
