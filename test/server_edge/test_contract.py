"""A body that SGLang's own check refuses is refused by the field's name."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_slo.server.contract import FIELDS_TRIED, PROBLEM_SHOWN, named


def check(body: Any) -> str | None:
    """A check like SGLang's: it tells what is wrong, not where."""
    values = [*body.values(), *dict(body.get("sampling_params") or {}).values()]
    wrong = [value for value in values if isinstance(value, complex)]
    return f"invalid type: {wrong[0]}" if wrong else None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"text": "a", "stream": 1j}, "stream"),
        ({"text": 1j}, "text"),
        ({"text": "a", "sampling_params": {"n": 1, "temperature": 1j}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"\ud800\n": 1j}}, r"sampling_params.'\ud800\n'"),
    ],
)
def test_the_field_stands_before_what_is_wrong_with_it(body: dict[str, Any], field: str) -> None:
    assert named(check)(body) == f"{field}: invalid type: 1j"


def test_what_is_right_passes_and_what_is_no_object_is_told_as_sglang_tells_it() -> None:
    assert named(check)({"text": "a"}) is None
    assert named(lambda body: "need an object")([]) == "need an object"


def test_an_answer_is_quick_and_short_whatever_is_sent() -> None:
    calls = []

    def refuse_all_but_alone(body: Any) -> str | None:
        calls.append(body)
        return "x" * 10_000 if len(body) > 2 else None

    assert named(refuse_all_but_alone)({str(i): 1 for i in range(10_000)}) == "x" * PROBLEM_SHOWN
    assert len(calls) == FIELDS_TRIED + 1
    assert len(named(lambda body: "x" * 10_000)({"text": 1}) or "") < 300


def test_it_is_installed_once_where_sglang_has_such_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.entrypoints import http_server

    from sglang_slo.server import contract

    monkeypatch.setattr(http_server, "generate_contract_error", check, raising=False)
    contract.install()
    once = http_server.generate_contract_error
    contract.install()
    assert http_server.generate_contract_error is once is not check
    monkeypatch.delattr(http_server, "generate_contract_error")
    contract.install()
    assert not hasattr(http_server, "generate_contract_error")
