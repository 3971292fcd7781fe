"""A real Prometheus that scrapes a real server: every query of the dashboard returns data, and the metrics are clean.

    scripts/run.sh -- benchmark/field/watched.py

Needs `prometheus` and `promtool` on PATH (`apt-get install prometheus`). The server has little KV, and its clients ask for
what can be kept and for what cannot, so that every panel has something to show. Ends with status 1 if a query returns
nothing or promtool finds fault with a metric of ours.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from child_process import free_port
from field.tools import running
from servers import end_cleanly, server

ROOT = Path(__file__).resolve().parent.parent.parent
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "sglang-slo.json"
SETTINGS = """classes:
  chat: {ttft_ms: 20000, tbt_ms: 8000}
  hopeless: {ttft_ms: 0.001, tbt_ms: 0.001}
"""
SCRAPE_S = 1
PATIENCE_S = 90.0  # for a query's first series, while clients keep asking
# little KV and a bold admission: some who decode have to be preempted
SHORT_OF_KV = ["--max-total-tokens", "2000", "--slo-kv", "stock", "--schedule-conservativeness", "0.05"]
SHORT_OF_KV += ["--slo-length", "none"]


class Prometheus:
    """A running one. `url`: where it answers."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, text: str) -> list[dict[str, Any]]:
        """What an instant query returns."""
        answer = requests.get(self.url + "/api/v1/query", params={"query": text}, timeout=30)
        answer.raise_for_status()
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    def firing(self) -> set[str]:
        """The alerts that fire now, with their class or instance."""
        rows = self.query('ALERTS{alertstate="firing"}')
        return {
            " ".join(filter(None, (r["metric"]["alertname"], r["metric"].get("slo_class")))) for r in rows
        }


@contextmanager
def prometheus(targets: Sequence[str], folder: Path, rules: str) -> Iterator[Prometheus]:
    """Debian's Prometheus, which scrapes `targets` (host:port) and evaluates `rules` every second."""
    found = shutil.which("prometheus")
    if found is None:
        raise SystemExit("watched.py: no `prometheus` on PATH: apt-get install prometheus")
    (folder / "alerts.yml").write_text(rules)
    times = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    job = {"job_name": "sglang-slo", "static_configs": [{"targets": list(targets)}]}
    config = {"global": times, "rule_files": ["alerts.yml"], "scrape_configs": [job]}
    (folder / "prometheus.yml").write_text(json.dumps(config))
    shutil.rmtree(folder / "tsdb", ignore_errors=True)
    address = f"127.0.0.1:{free_port()}"
    command = [found, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    command += [f"--web.listen-address={address}"]
    with running(command, f"http://{address}/-/ready", folder / "prometheus.log"):
        yield Prometheus(f"http://{address}")


def ask(url: str, number: int, tokens: int, words: int = 20, **fields: Any) -> int:
    """One request; its status, 0 if the server is gone."""
    params = {"max_new_tokens": tokens, "ignore_eos": True}
    body = {"text": f"{number} " + "word " * words, "sampling_params": params, **fields}
    with contextlib.suppress(requests.RequestException):
        return requests.post(url + "/generate", json=body, timeout=300).status_code
    return 0


def traffic(url: str, count: int, at_once: int, tokens: int, limits: Sequence[Any]) -> list[int]:
    """Requests that ask for `limits` in turn (None: nothing), `at_once` in flight; their statuses."""
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        jobs = []
        for i in range(count):
            slo = limits[i % len(limits)]
            jobs.append(pool.submit(ask, url, i, tokens, 20 + i % 60, **({"slo": slo} if slo else {})))
        return [job.result() for job in jobs]


def queries() -> list[str]:
    """Every query of every panel of the dashboard."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def filled(query: str) -> str:
    """A query of the dashboard as Grafana sends it."""
    return query.replace("$__rate_interval", "60s").replace("$instance", ".*").replace("$slo_class", ".*")


@contextmanager
def busy(url: str) -> Iterator[None]:
    """While it is open, clients ask: without limits, for what cannot be kept, and for what can."""
    over = threading.Event()

    def ask_on() -> None:
        while not over.is_set():
            traffic(url, 24, 12, 80, [None, {"class": "hopeless"}, {"class": "chat"}])

    clients = threading.Thread(target=ask_on)
    clients.start()
    try:
        yield
    finally:
        over.set()
        clients.join()


def first_series(watching: Prometheus, query: str, until_s: float) -> list[dict[str, Any]]:
    """What a query returns, as soon as that is anything; by `until_s` (monotonic) at the latest."""
    while True:
        rows = watching.query(filled(query))
        if rows or time.monotonic() > until_s:
            return rows
        time.sleep(SCRAPE_S / 2)


def unclean(url: str) -> str:
    """What promtool says of our metrics."""
    text = requests.get(url + "/metrics", timeout=30).text
    ours = "".join(
        line + "\n" for line in text.splitlines() if re.match(r"(# (HELP|TYPE) )?sglang_slo_", line)
    )
    done = subprocess.run(["promtool", "check", "metrics"], input=ours, capture_output=True, text=True)
    return done.stdout + done.stderr


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/watched"), help="folder for logs")
    folder = parser.parse_args().out.resolve()
    end_cleanly()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "slo.yaml").write_text(SETTINGS)
    flags = ["--enable-metrics", "--sleep-on-idle", "--slo-config", str(folder / "slo.yaml"), *SHORT_OF_KV]
    empty, count = [], 0
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(server("slo", flags, folder / "server.log"))
        target = url.removeprefix("http://")
        watching = stack.enter_context(prometheus([target], folder, ALERTS.read_text()))
        until_s = time.monotonic() + PATIENCE_S
        with busy(url):
            for query in queries():
                rows, count = first_series(watching, query, until_s), count + 1
                print(f"{len(rows):3} series  {query[:110]}")
                empty += [] if rows else [query]
        said = unclean(url)
    print(f"{count - len(empty)} of {count} queries of the dashboard return data")
    print(f"promtool check metrics: {said.strip() or 'clean'}")
    for query in empty:
        print(f"no data: {query}", file=sys.stderr)
    return int(bool(empty or said.strip()))


if __name__ == "__main__":
    sys.exit(main())
