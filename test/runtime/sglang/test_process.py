"""A scheduler in this process has nothing that one in another process has as well."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_slo.runtime.sglang import process


@dataclass
class Drawn:
    """Ports as a newer SGLang chooses them."""

    nccl_port: int

    @classmethod
    def init_new(cls, server_args: Any) -> Drawn:
        return cls(random.randrange(22000, 30000))


def test_schedulers_of_processes_that_were_seeded_alike_have_ports_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "PortArgs", Drawn)

    def port() -> int:
        random.seed(1)  # as a scheduler does, from its settings
        return int(process.build(lambda args, ports, *place: ports, SimpleNamespace()).nccl_port)

    assert port() != port()
