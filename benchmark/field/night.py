"""The 3 a.m. exercise: what the page and the alerts show when things go wrong, on a real server and a real Prometheus.

    scripts/run.sh -- benchmark/field/night.py --write docs/exercise.md

Four troubles, each made on purpose: KV runs short; a client declares 1 ms on everything; the latency profile is wrong by
3x; a replica dies. Alerts are those of deploy/prometheus/alerts.yml with all of their times divided by 20, so that an
exercise takes minutes. For each: the line that `/slo/status` and the page show, and the alerts that fired meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from field.watched import ALERTS, SHORT_OF_KV, Prometheus, prometheus, traffic
from servers import end_cleanly, server

FASTER = 20  # times are divided by this
SETTINGS = """classes:
  chat: {ttft_ms: 4000, tbt_ms: 1500}
default_class: chat
"""
CHAT, IMPATIENT = {"class": "chat"}, {"ttft_ms": 1, "tbt_ms": 1, "e2e_ms": 1}
EPISODE_S = 45.0
FIGURES = {  # what else an operator looks at, from Prometheus
    "preemptions": "sum(sglang_slo_preemptions_total)",
    "KV held, of all": "sum(sglang_slo_kv_held_tokens) / sum(sglang_slo_kv_capacity_tokens)",
    "waiting": "sum(sglang_slo_waiting_requests)",
    "longest wait, s": "max(sglang_slo_oldest_waiting_seconds)",
    "drift": "max(sglang_slo_latency_drift_ratio)",
    "headroom of chat, tokens/s": 'sum(sglang_slo_headroom_tokens_per_second{slo_class="chat"})',
    "planning failed": "sum(sglang_slo_fallbacks_total)",
}


@dataclass
class Episode:
    """What was seen. `verdicts`: the lines of the status, without repeats; `fired`: alert to seconds after the start."""

    title: str
    made: str
    verdicts: list[str] = field(default_factory=list)
    fired: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def page(self) -> str:
        """As a section of the page."""
        last = self.verdicts[-1] if self.verdicts else "no answer"
        alerts = ", ".join(f"{name} after {s * FASTER / 60:.0f} min" for name, s in self.fired.items())
        rows = ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
        return (
            f"## {self.title}\n\nMade by: {self.made}.\n\n- the page said: {last}\n"
            f"- alerts, in the rules' own time: {alerts or 'none'}\n- figures at the end: {rows or 'none: it is gone'}\n"
        )


def faster(rules: str) -> str:
    """The rules with every duration divided by FASTER."""
    unit_s = {"s": 1, "m": 60, "h": 3600}

    def shorter(match: re.Match[str]) -> str:
        seconds = int(match[2]) * unit_s[match[3]] / FASTER
        return f"{match[1]}{max(round(seconds), 3)}s"

    return re.sub(r"(\[|for: )(\d+)([smh])\b", shorter, rules)


def watch(episode: Episode, url: str, watching: Prometheus, until: threading.Event) -> None:
    """Note what is shown until the episode is over."""
    start = time.monotonic()
    while True:
        try:
            line = requests.get(url + "/slo/status", timeout=10).json()["verdict"]
        except (requests.RequestException, KeyError, ValueError):
            line = "no answer from the server"
        if not episode.verdicts or episode.verdicts[-1] != line:
            episode.verdicts.append(line)
        for name in sorted(watching.firing()):
            episode.fired.setdefault(name, time.monotonic() - start)
        if until.wait(1.0):
            return


def play(episode: Episode, url: str, watching: Prometheus, limits: Sequence[Any], tokens: int) -> Episode:
    """Traffic for EPISODE_S, watched."""
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(episode, url, watching, over))
    watcher.start()
    deadline = time.monotonic() + EPISODE_S
    while time.monotonic() < deadline:
        traffic(url, 16, 16, tokens, limits)
    for name, query in FIGURES.items():
        rows = watching.query(query)
        if rows and rows[0]["value"][1] != "NaN":
            episode.figures[name] = float(rows[0]["value"][1])
    over.set()
    watcher.join()
    print(episode.page(), flush=True)
    return episode


@contextmanager
def replica(name: str, folder: Path, flags: Sequence[str]) -> Iterator[tuple[str, Prometheus]]:
    """A server, which measures its own profile into `folder`, and the Prometheus that watches it."""
    (folder / "slo.yaml").write_text(SETTINGS)
    own = ["--enable-metrics", "--sleep-on-idle", "--slo-config", str(folder / "slo.yaml"), *flags]
    cache = {"SGLANG_SLO_CACHE_DIR": str(folder / "cache")}
    with ExitStack() as stack:
        url = stack.enter_context(server("slo", own, folder / f"{name}.log", cache))
        target, rules = url.removeprefix("http://"), faster(ALERTS.read_text())
        yield url, stack.enter_context(prometheus([target], folder, rules))


def short_of_kv_and_impatient(folder: Path) -> list[Episode]:
    """A replica with little KV, then a client that asks for the impossible, then its end."""
    kv = Episode("KV runs short", "a pool of 2,000 tokens, a bold admission, 16 clients with 300 tokens each")
    one_ms = Episode(
        "A client declares 1 ms on everything", "every second request asks for 1 ms, first and last"
    )
    with replica("short", folder, SHORT_OF_KV) as (url, watching):
        play(kv, url, watching, [CHAT], 300)
        time.sleep(15)  # so that the windows of the alerts forget
        play(one_ms, url, watching, [CHAT, IMPATIENT], 30)
        return [kv, one_ms, dies(url, watching)]


def dies(url: str, watching: Prometheus) -> Episode:
    """The end of a replica that is watched."""
    episode = Episode("A replica dies", "SIGKILL to its processes")
    _kill(url)
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(episode, url, watching, over))
    watcher.start()
    time.sleep(10)
    over.set()
    watcher.join()
    print(episode.page(), flush=True)
    return episode


def _kill(url: str) -> None:
    port = url.rpartition(":")[2]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"sglang_slo.launch_server" in words and port.encode() in words:
            os.killpg(os.getpgid(int(process.name)), signal.SIGKILL)
            return


def wrong_profile(folder: Path) -> Episode:
    """A replica that is told its device is three times as fast as the last one found it."""
    episode = Episode(
        "The latency profile is wrong by 3x", "every coefficient of the measured profile over 3"
    )
    [measured] = (folder / "cache" / "profiles").glob("*.json")
    told, own = json.loads(measured.read_text()), folder / "profile.json"
    told["coefficients"] = {name: value / 3 for name, value in told["coefficients"].items()}
    own.write_text(json.dumps(told))
    with replica("wrong", folder, ["--slo-profile", str(own)]) as (url, watching):
        return play(episode, url, watching, [CHAT], 30)


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="write the page of the docs here")
    parser.add_argument("--out", type=Path, default=Path("out/night"), help="folder for logs")
    args = parser.parse_args()
    folder = args.out.resolve()
    shutil.rmtree(folder / "cache", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    end_cleanly()
    episodes = [*short_of_kv_and_impatient(folder), wrong_profile(folder)]
    if args.write:
        text = Path(__file__).with_name("exercise.in.md").read_text()
        sections = "\n".join(episode.page() for episode in episodes)
        args.write.write_text(
            text.replace("{{when}}", time.strftime("%Y-%m-%d")).replace("{{sections}}", sections)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
