"""The search for the highest rate that keeps its target: right for any server whose attainment falls with load."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_slo import goodput
from sglang_slo.goodput import Probe, best, search


@given(capacity=st.floats(0.05, 500), first=st.floats(0.1, 20), tolerance=st.floats(0.02, 0.5))
def test_the_rate_found_holds_and_the_next_that_was_tried_does_not(
    capacity: float, first: float, tolerance: float
) -> None:
    def probe(rate: float) -> Probe:
        return Probe(rate, 1000, 1000 if rate <= capacity else 0)

    probes = list(search(probe, first, 0.95, tolerance))
    found = best(probes, 0.95)
    if found is None:
        assert capacity < first
        return
    assert found.rate_rps <= capacity
    if len(probes) < goodput.MAX_PROBES:
        failed = min(p.rate_rps for p in probes if p.rate_rps > capacity)
        assert failed - found.rate_rps <= tolerance * max(found.rate_rps, first * tolerance)


def test_a_probe_without_a_judged_request_holds_nothing() -> None:
    assert best([Probe(1.0, 0, 0)], 0.5) is None


class Status(BaseHTTPRequestHandler):
    """A server's `/slo/status`, whose counts the load tool of the test raises by a file."""

    counts: Path

    def do_GET(self) -> None:
        judged, attained = json.loads(self.counts.read_text())
        figures = {"judged": judged, "attained": attained}
        body = json.dumps({"classes": {"chat": {}}, "windows": {"1h": {"chat": figures}}}).encode()
        self.send_response(200 if self.headers["authorization"] == "Bearer k" else 401)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


TOOL = """#!/usr/bin/env python3
import json, sys
counts = {counts!r}
words = sys.argv
rate = json.loads(words[words.index("--profile") + 1])["rate"][0]
headers = json.loads(words[words.index("--backend") + 1])["extras"]["headers"]
assert headers == {{"x-slo-class": "chat", "authorization": "Bearer k"}}, headers
judged, attained = json.load(open(counts))
json.dump([judged + 100, attained + (100 if rate <= 5 else 40)], open(counts, "w"))
"""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    Status.counts = tmp_path / "counts.json"
    Status.counts.write_text("[7, 3]")
    tool = tmp_path / "guidellm"
    tool.write_text(TOOL.format(counts=str(Status.counts)))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    httpd = HTTPServer(("127.0.0.1", 0), Status)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def flags(url: str, tmp_path: Path, slo_class: str = "chat") -> list[str]:
    flags = ["--url", url, "--class", slo_class, "--tokenizer", "t", "--api-key", "k", "--target", "0.9"]
    return [*flags, "--guidellm", str(tmp_path / "guidellm"), "--picture", str(tmp_path / "rate.png")]


def test_a_live_server_is_asked_what_became_of_each_probe(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(goodput, "SETTLE_S", 0.0)
    assert goodput.main(flags(address, tmp_path)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["1", "req/s:", "100", "of", "100", "attained"]
    rate = float(said[-1].split()[0])
    assert 4.5 <= rate <= 5 and (tmp_path / "rate.png").stat().st_size > 0


def test_an_unknown_class_and_a_missing_program_are_told(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert goodput.main(flags(address, tmp_path, slo_class="gold")) == 2
    assert "--class: need one of ['chat'], got 'gold'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        goodput.main([*flags(address, tmp_path), "--guidellm", "/no/such/program"])
    assert "--guidellm: no program" in capsys.readouterr().err
