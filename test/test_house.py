"""The house rules that no linter knows: no file too long to see, no function too long to see whole."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from conftest import SHARED, kept_together

ROOT = Path(__file__).resolve().parents[1] / "python" / "sglang_slo"
MOST_FILE_LINES = 320
MOST_FUNCTION_LINES = 45
MOST_SCHEDULER_LINES = 300  # overrides, and nothing else
FILES = sorted(ROOT.rglob("*.py"))


def too_long(path: Path) -> list[str]:
    """What of a file breaks the rules."""
    text = path.read_text()
    lines = len(text.splitlines())
    found = [f"{path}: {lines} lines"] if lines > MOST_FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > MOST_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    return found


def test_no_file_and_no_function_is_too_long_to_see() -> None:
    assert not [fault for path in FILES for fault in too_long(path)]


def test_the_rules_see_what_they_are_for(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text("def long():\n" + "    pass\n" * MOST_FILE_LINES)
    assert [fault.split(": ")[1] for fault in too_long(path)] == [
        f"{MOST_FILE_LINES + 1} lines",
        f"long has {MOST_FILE_LINES + 1} lines",
    ]


def test_the_scheduler_is_overrides_and_nothing_else() -> None:
    path = ROOT / "runtime" / "scheduler" / "scheduler.py"
    assert len(path.read_text().splitlines()) <= MOST_SCHEDULER_LINES


@pytest.mark.parametrize(
    "room", sorted({path.parent for path in FILES}), ids=lambda p: str(p.relative_to(ROOT))
)
def test_each_room_says_what_it_decides_and_what_always_holds(room: Path) -> None:
    said = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    assert room == ROOT or ("Always:" in said and len(said.splitlines()) >= 3)


def test_processes_that_share_the_tests_part_none_that_share_a_server_or_a_file() -> None:
    shared = [kept_together(f"test/{name}.py::test") for name in ("server/test_modes", "observe/test_server")]
    assert shared == [SHARED, SHARED]
    assert kept_together("test/server/test_same_words.py::a[b]") == "test/server/test_same_words.py"
    apart = ["test/server/test_ways_in.py::a[tp 2]", "test/server/test_ways_in.py::a[dp 2]"]
    assert [kept_together(nodeid) for nodeid in apart] == apart
