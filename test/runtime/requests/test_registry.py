"""A row is a request's for as long as the table has it given out, whatever raises around it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("sglang.srt.managers.schedule_batch")

from fakes import MODEL, FakeRequest
from sglang_slo.config import SloConfig
from sglang_slo.core.slo import Slo
from sglang_slo.core.table import RequestTable
from sglang_slo.runtime.requests.registry import RequestRegistry


def _request() -> Any:
    req = FakeRequest()
    req.sampling_params.json_schema = req.sampling_params.regex = None
    req.sampling_params.ebnf = req.sampling_params.structural_tag = None
    return req


def _raises_after(done: Any) -> Any:
    """`done`, which does what it does, and raises then."""

    def raising(*args: Any) -> None:
        done(*args)
        raise RuntimeError("after it was done")

    return raising


def test_no_row_is_nobodys_and_none_has_two_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = RequestRegistry(SloConfig(length="none"))
    first, second, third = (_request() for _ in range(3))
    registry.open(first, Slo(1.0, 0.1), 0.0, MODEL)
    with monkeypatch.context() as patch:
        patch.setattr(RequestTable, "add", _raises_after(RequestTable.add))
        with pytest.raises(RuntimeError):
            registry.open(second, Slo(1.0, 0.1), 0.0, MODEL)
    assert len(registry.table) == len(registry.reqs) == 1 and second.slo_row < 0
    with monkeypatch.context() as patch:
        patch.setattr(RequestTable, "remove", _raises_after(RequestTable.remove))
        with pytest.raises(RuntimeError):
            registry.close(first)
    assert len(registry.table) == len(registry.reqs) == 0 and first.slo_row < 0
    row = registry.open(third, Slo(1.0, 0.1), 0.0, MODEL)
    registry.close(first)  # once more: it has none
    assert registry.reqs == {row: third}
