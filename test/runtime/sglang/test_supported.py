"""Only releases that are tested are served with; any other is refused by name."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from sglang_slo.runtime.sglang import supported

ROOT = Path(__file__).parents[3]


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def found(name: str) -> str:
        if version is None:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr(supported, "version", found)


@pytest.mark.parametrize("version", [*supported.SUPPORTED, supported.SUPPORTED[0] + "+cu130"])
def test_a_supported_release_passes(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, version)
    supported.check()


@pytest.mark.parametrize("version", ["0.5.18", "0.5.230", "0.6.0", None])
def test_another_is_refused_with_what_is_accepted(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, version)
    with pytest.raises(
        supported.UnsupportedError, match=r"accepted: 0\.5\.23, 0\.5\.17; installed: " + (version or "none")
    ):
        supported.check()


def test_the_package_depends_on_those_and_no_others() -> None:
    told = re.search(r'"sglang([<>=!~][^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert told is not None
    accepted = SpecifierSet(told[1])
    between = [f"0.5.{n}" for n in range(10, 40)] + ["0.4.9", "0.6.0", "1.0.0"]
    assert {version for version in between if version in accepted} == set(supported.SUPPORTED)


def test_every_supported_release_has_a_lock_that_pins_it() -> None:
    pinned = {
        line.removeprefix("sglang==").strip()
        for lock in ROOT.glob("requirements*.lock")
        for line in lock.read_text().splitlines()
        if line.startswith("sglang==")
    }
    assert pinned == set(supported.SUPPORTED)
