"""scripts/env.sh with an empty lock file: one environment a lock, never a half-built one."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

ENV_SH = Path(__file__).parent.parent / "scripts" / "env.sh"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("scripts")
    lock = folder / "empty.lock"
    lock.write_text("# nothing\n")
    return {**os.environ, "SGLANG_SLO_LOCK": str(lock), "SGLANG_SLO_ENV_DIR": str(folder / "envs")}


def start(settings: dict[str, str], *args: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([ENV_SH, *args], env=settings, stdout=pipe, stderr=pipe, text=True)


def made(settings: dict[str, str]) -> tuple[Path, str]:
    """The environment's python as the script tells it, and what it said meanwhile."""
    process = start(settings)
    out, said = process.communicate()
    assert process.returncode == 0, said
    return Path(out.splitlines()[-1]), said


@pytest.fixture(scope="module")
def python(settings: dict[str, str]) -> Path:
    path, said = made(settings)
    assert "building" in said
    return path


def test_an_environment_is_built_once_and_works(python: Path, settings: dict[str, str]) -> None:
    subprocess.run([python, "-c", "import sys; assert sys.prefix != sys.base_prefix"], check=True)
    again, said = made(settings)
    assert again == python and not said


def test_a_killed_build_is_not_taken_for_a_finished_one(python: Path, settings: dict[str, str]) -> None:
    environment = python.parent.parent
    (environment / ".complete").unlink()  # as a kill leaves it: everything but the last step
    (environment / "leftover").touch()
    again, said = made(settings)
    assert again == python and "unfinished" in said
    assert (environment / ".complete").exists() and not (environment / "leftover").exists()


def test_two_builds_of_another_lock_at_once_make_one_more(python: Path, settings: dict[str, str]) -> None:
    Path(settings["SGLANG_SLO_LOCK"]).write_text("# something\n")
    both = [start(settings), start(settings)]
    outs = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert outs[0][0] == outs[1][0] != f"{python}\n"
    assert sum("building" in said for _, said in outs) == 1


DAY_S = 86400


def test_an_environment_that_nobody_asks_for_goes_but_none_in_use(
    settings: dict[str, str], tmp_path: Path
) -> None:
    settings = {**settings, "SGLANG_SLO_ENV_DIR": str(tmp_path)}
    for name, days in {"env-old": 31, "env-used": 31, "env-new": 29}.items():
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / ".complete").touch()
        then = time.time() - days * DAY_S
        os.utime(tmp_path / name / ".complete", (then, then))
    sleep = tmp_path / "env-used" / "bin" / "sleep"
    sleep.symlink_to("/bin/sleep")
    with subprocess.Popen([str(sleep), "600"]) as user:
        try:
            current, said = made(settings)
            assert "removing" in said and "env-old" in said
            left = {path.name for path in tmp_path.glob("env-*") if path.is_dir()}
            assert left == {"env-used", "env-new", current.parent.parent.name}
            removal = start(settings, "--remove")
            _, said = removal.communicate()
            assert removal.returncode == 1 and "kept, as a process uses it" in said
            assert [path.name for path in tmp_path.glob("env-*") if path.is_dir()] == ["env-used"]
        finally:
            user.kill()
    assert start(settings, "--remove").wait() == 0
    assert not tmp_path.exists()


def test_an_unknown_argument_is_refused_by_name(settings: dict[str, str]) -> None:
    process = start(settings, "--removal")
    assert process.wait() != 0 and process.stderr is not None
    assert "--removal" in process.stderr.read()


def test_a_python_that_cannot_do_it_is_named(settings: dict[str, str]) -> None:
    process = start({**settings, "SGLANG_SLO_PYTHON": "/bin/false"})
    assert process.wait() != 0 and process.stderr is not None
    assert "SGLANG_SLO_PYTHON" in process.stderr.read()
