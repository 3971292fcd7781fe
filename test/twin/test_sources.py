"""What a stock run is kept under: every file that can change it, and none that only our scheduler reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sglang_slo.twin import sources

# imports everything that a stock run imports, and says what of ours that was
STOCK_RUN = """
import sys
import sglang_slo.twin.sim.driver
print(*(m.__file__ for n, m in sys.modules.items() if n.startswith("sglang_slo") and m.__file__), sep="\\n")
"""


def test_all_that_a_stock_run_imports_is_in_its_key_but_what_ours_alone_asks() -> None:
    done = subprocess.run([sys.executable, "-c", STOCK_RUN], capture_output=True, text=True, check=True)
    imported = {
        str(Path(line).relative_to(sources.PACKAGE))
        for line in done.stdout.splitlines()
        if line.startswith(str(sources.PACKAGE))
    }
    known, told = (
        {str(file.relative_to(sources.PACKAGE)) for file in sources.of_stock(without=without)}
        for without in (sources.ONLY_OURS, ())
    )
    assert {name for name in imported - told if "__init__" not in name} <= {"plugin.py"}  # by SGLang
    assert {"core/slo.py", "config.py", "core/deliveries.py", "twin/workloads/workload.py"} <= known
    assert not {"core/plan.py", "core/ordering.py", "runtime/scheduler/scheduler.py"} & known


def test_imports_are_followed_wherever_they_stand(tmp_path: Path) -> None:
    root = tmp_path / "pack"
    (root / "deep").mkdir(parents=True)
    (root / "start.py").write_text("def f():\n    from pack.deep import one\n")
    (root / "deep" / "__init__.py").write_text("")
    (root / "deep" / "one.py").write_text("if True:\n    import pack.two as t\nfrom pack.ours import x\n")
    (root / "two.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pack.types_\n"
    )
    for name in ("ours", "types_", "other"):
        (root / f"{name}.py").write_text("x = 1\n")
    found = [str(f.relative_to(root)) for f in sources.of_stock(root, "start.py", ("ours.py",))]
    assert found == ["deep/__init__.py", "deep/one.py", "start.py", "two.py"]
