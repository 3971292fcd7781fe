"""The campaign's short form on a real server: fuzzed requests and clients of every kind, for a few seconds each."""

from __future__ import annotations

import asyncio
import random

import psutil
import pytest

from campaign.fuzz import Seen, send_fuzzed
from campaign.serving import Serving
from campaign.soak import soaked
from conftest import Server

pytestmark = pytest.mark.server


def test_fuzzed_requests_are_answered_and_the_next_one_is_served(server: Server) -> None:
    seen = Seen()
    left = asyncio.run(send_fuzzed(server.url, random.Random(5), 160, seen, lambda line: None))
    assert left == 0
    assert not seen.deaths and not seen.hung and not seen.unserved


def test_clients_of_every_kind_are_answered_and_the_server_is_at_rest_afterwards(server: Server) -> None:
    serving = Serving(server.url, server.log, psutil.Process(server.process.pid))
    checks = asyncio.run(soaked(serving, 12.0, 3, lambda line: None))
    assert [c for c in checks if not c.held and c.name != "soak: nothing grows"] == []
