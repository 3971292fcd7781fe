"""Rows of the table are given whole, or not at all."""

from __future__ import annotations

import pytest

from sglang_slo.core.slo import Slo
from sglang_slo.core.table import RequestTable

SLO = Slo(ttft_s=1.0, tbt_s=0.1)


def test_a_row_that_cannot_be_written_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    table = RequestTable()
    first = table.add(SLO, 0.0, 10, 20)
    with monkeypatch.context() as patch:
        patch.setattr("sglang_slo.core.table.bucket", lambda tbt_s: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            table.add(SLO, 0.0, 10, 20)
    assert len(table) == 1
    second = table.add(SLO, 0.0, 10, 20)
    table.remove(second)
    assert second != first and len(table) == 1


def test_one_that_had_begun_before_it_had_a_row_is_judged_from_now_on() -> None:
    table = RequestTable()
    row = table.add(SLO, 0.0, 10, 20)
    table.goes_on(row, 50.0)
    assert table.due_s([row]).tolist() == [50.1]
    assert table.feasible([row]).all() and table.begun[row]
