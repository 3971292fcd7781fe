"""Which source files a kind of run depends on, told from what they import: the key under which a run is kept.

Ours depends on the whole package. Stock's depends on what the twin's driver imports, and what that imports, wherever
in a file the import stands; but not on what is only ever asked by our scheduler (`ONLY_OURS`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
DRIVER = "twin/sim/driver.py"
ONLY_OURS = (
    "core/orders/",
    "runtime/scheduler/",
    "runtime/requests/lengths.py",
    "estimator/",
    "twin/predictors.py",
    "twin/sim/host_pool.py",
)


def of_stock(root: Path = PACKAGE, start: str = DRIVER, without: tuple[str, ...] = ONLY_OURS) -> list[Path]:
    """Files of the package at `root` that a run of SGLang's own scheduler depends on, in order."""
    seen: set[Path] = set()
    todo = [root / start]
    while todo:
        file = todo.pop()
        if file in seen or str(file.relative_to(root)).startswith(without):
            continue
        seen.add(file)
        todo += _files(root, _imported(ast.parse(file.read_text())))
    return sorted(seen)


def of_ours(root: Path = PACKAGE) -> list[Path]:
    """All files of the package, in order."""
    return sorted(root.rglob("*.py"))


def _imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names that may be modules; what is for the type checker alone is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from _imported(other)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from _imported(node)


def _files(root: Path, names: Iterable[str]) -> Iterator[Path]:
    for name in names:
        package, *parts = name.split(".")
        if package != root.name:
            continue
        place = root.joinpath(*parts)
        yield from (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file())
