"""What the tests of a real scheduler share."""

from __future__ import annotations

from pathlib import Path

import pytest

import real_scheduler as real
from crowded import COUNT, requests


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs keep the demo model and a profile."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def expected(folder: Path) -> dict[str, list[int]]:
    """SGLang's own tokens for `crowded.requests`, with room for everyone."""
    roomy = ["--max-total-tokens", "20000"]
    return real.run(real.all_at_once(requests()), COUNT, roomy, folder, False).tokens
