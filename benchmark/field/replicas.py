"""Two CPU replicas behind Ray Serve: round robin beside the choice by deadlines, a replica's death, and `sglang-router`.

    scripts/run.sh -- benchmark/field/replicas.py --write docs/replicas.md

Starts two real servers with the demo model, and in front of them Ray Serve with `deploy/ray` (both ways of choosing at once,
under two paths) and SGLang's router. The load is skewed: every second request has a long prompt and is in a hurry, so that
round robin puts all of those on one replica. Rounds alternate between the two ways.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from child_process import free_port
from field.tools import python_of, running, version_of
from servers import end_cleanly, server

START = Path(__file__).resolve().parents[2] / "deploy" / "ray" / "start.py"
PATIENCE_S = 900.0  # of clients: other work may stop this machine for minutes
TIGHT, LOOSE = "tight", "loose"
WAYS = {"round robin": "/round_robin", "by deadlines": ""}
FLAGS = ["--sleep-on-idle", "--served-model-name", "demo", "--max-total-tokens", "40000"]


@dataclass(frozen=True)
class Load:
    """One round: `count` requests, `gap_s` apart; every second is tight and long. Limits in ms, prompts in characters."""

    count: int = 80
    gap_s: float = 0.2
    tight_chars: int = 4000
    tight_tokens: int = 16
    loose_chars: int = 200
    loose_tokens: int = 32
    tight_ttft_ms: int = 1500
    tight_tbt_ms: int = 500
    loose_ttft_ms: int = 10000
    loose_tbt_ms: int = 2000

    def settings(self) -> str:
        """The server's slo.yaml."""
        return (
            f"classes:\n  {TIGHT}: {{ttft_ms: {self.tight_ttft_ms}, tbt_ms: {self.tight_tbt_ms}}}\n"
            f"  {LOOSE}: {{ttft_ms: {self.loose_ttft_ms}, tbt_ms: {self.loose_tbt_ms}}}\n"
        )

    def request(self, i: int, seed: int) -> tuple[str, dict[str, Any]]:
        """Class and body of the i-th request; no two prompts begin alike."""
        name = LOOSE if i % 2 else TIGHT
        chars, tokens = (
            (self.loose_chars, self.loose_tokens) if i % 2 else (self.tight_chars, self.tight_tokens)
        )
        letters = random.Random(f"{seed} {i}")
        text = "".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=chars))
        params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
        return name, {"text": text, "sampling_params": params, "slo": {"class": name}}

    def said(self) -> str:
        """In a sentence."""
        return (
            f"Rounds of {self.count} requests, {self.gap_s:g} s apart. Every second, of class `{TIGHT}`, has "
            f"{self.tight_chars} characters and asks for {self.tight_tokens} tokens, "
            f"the first within {self.tight_ttft_ms} ms, no gap above {self.tight_tbt_ms} ms; "
            f"the others have {self.loose_chars} and ask for {self.loose_tokens}, "
            f"within {self.loose_ttft_ms / 1e3:g} s. In turns, all of the former come to one replica. "
            f"Attained, of {self.count // 2} of class `{TIGHT}`, as the servers judged:"
        )


def played(url: str, load: Load, seed: int) -> dict[str, Counter[str]]:
    """One round, open loop: class to how many were attained, missed, or not answered."""
    found: dict[str, Counter[str]] = {TIGHT: Counter(), LOOSE: Counter()}
    lock, start_s = threading.Lock(), time.monotonic() + 0.2

    def one(i: int) -> None:
        name, body = load.request(i, seed)
        time.sleep(max(start_s + i * load.gap_s - time.monotonic(), 0))
        try:
            answer = requests.post(url + "/generate", json=body, timeout=PATIENCE_S)
            told = answer.json()["meta_info"]["slo"] if answer.status_code == 200 else None
        except requests.RequestException:
            told = None
        with lock:
            found[name]["lost" if told is None else "attained" if told["attained"] else "missed"] += 1

    with ThreadPoolExecutor(load.count) as pool:
        list(pool.map(one, range(load.count)))
    return found


@contextmanager
def on_one_core(number: int) -> Iterator[None]:
    """Whatever is started meanwhile has one core: two servers that compute on the same ones wait for each other's threads."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[number % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def ray(workers: list[str], folder: Path) -> Iterator[str]:
    """Ray Serve in front of the workers; its URL."""
    port = free_port()
    command = [str(python_of("ray")), str(START), "--port", str(port), "--chars-per-token", "1"]
    command += ["--policy", "deadline", "round_robin", "--servers", *workers]
    url = f"http://127.0.0.1:{port}"
    env = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    with running(command, url + "/round_robin/health", folder / "ray.log", env):
        yield url


@contextmanager
def router(workers: list[str], folder: Path) -> Iterator[str]:
    """SGLang's router in front of the workers; its URL."""
    port = free_port()
    command = [str(python_of("router")), "-m", "sglang_router.launch_router", "--worker-urls", *workers]
    command += ["--port", str(port), "--host", "127.0.0.1", "--policy", "round_robin"]
    command += ["--prometheus-port", str(free_port())]
    url = f"http://127.0.0.1:{port}"
    with running(
        command, url + "/readiness", folder / "router.log"
    ):  # it answers before it knows its workers
        yield url


def through_router(url: str, logs: list[Path], count: int = 24) -> str:
    """Chat requests with limits in `metadata`: what of them arrived, and was kept."""
    before = [len(rows(log)) for log in logs]
    statuses: Counter[int] = Counter()
    for i in range(count):
        body: dict[str, Any] = {
            "model": "demo",
            "messages": [{"role": "user", "content": f"{i} Hello"}],
            "max_tokens": 8,
            "metadata": {"slo_ttft_ms": "30000", "slo_tbt_ms": "20000"},
        }
        statuses[requests.post(url + "/v1/chat/completions", json=body, timeout=PATIENCE_S).status_code] += 1
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s and sum(len(rows(log)) for log in logs) - sum(before) < count:
        time.sleep(0.2)
    new = [rows(log)[n:] for log, n in zip(logs, before, strict=True)]
    came = sum(row["ttft_limit_s"] == 30 and row["tbt_limit_s"] == 20 for part in new for row in part)
    kept = sum(bool(row["attained"]) for part in new for row in part)
    each = " and ".join(str(len(part)) for part in new)
    answers = ", ".join(f"{n} with status {status}" for status, n in sorted(statuses.items()))
    return (
        f"Of {count} chat requests with limits in `metadata`, answered {answers}, {each} "
        f"reached the two replicas, {came} with their limits, and {kept} were kept."
    )


def rows(log: Path) -> list[dict[str, Any]]:
    """Of a request log."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def streamed(url: str, body: dict[str, Any]) -> tuple[bool, bool, str]:
    """One streamed request: whether its answer began, whether it ended as it should, and its text."""
    begun, ended, text = False, False, ""
    try:
        with requests.post(
            url + "/generate", json={**body, "stream": True}, timeout=PATIENCE_S, stream=True
        ) as answer:
            for line in answer.iter_lines():
                begun |= answer.status_code == 200 and bool(line)
                ended |= line == b"data: [DONE]"
                if line.startswith(b"data: {"):
                    text = json.loads(line[6:]).get("text", text)
    except requests.RequestException:
        pass
    return begun, ended, text


def killed_half_way(url: str, victim: str, load: Load) -> dict[str, int]:
    """A round of streams and whole answers by turns, `victim` killed half-way: what became of them."""
    found: Counter[str] = Counter()
    lock, start_s = threading.Lock(), time.monotonic() + 0.2

    def one(i: int) -> None:
        _, body = load.request(i, seed=-1)
        body["sampling_params"]["max_new_tokens"] *= 4
        time.sleep(max(start_s + i * load.gap_s - time.monotonic(), 0))
        if i % 2:
            begun, ended, _ = streamed(url, body)
        else:
            try:
                begun = ended = (
                    requests.post(url + "/generate", json=body, timeout=PATIENCE_S).status_code == 200
                )
            except requests.RequestException:
                begun = ended = False
        with lock:
            found[
                "answered" if ended else "broken off after it had begun" if begun else "lost before it began"
            ] += 1

    with ThreadPoolExecutor(load.count + 1) as pool:
        jobs = [pool.submit(one, i) for i in range(load.count)]
        time.sleep(max(start_s + load.count * load.gap_s / 2 - time.monotonic(), 0))
        kill(victim.rpartition(":")[2])
        for job in jobs:
            job.result()
    return dict(found)


def kill(port: str) -> None:
    """SIGKILL for the server on this port and all its processes."""
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().split(b"\0") if process.name.isdigit() else []
        except OSError:
            continue
        if b"sglang_slo.launch_server" in words and port.encode() in words:
            os.killpg(os.getpgid(int(process.name)), signal.SIGKILL)
            return
    raise RuntimeError(f"no server on port {port}")


def measure(folder: Path, load: Load, rounds: int, spare: str) -> dict[str, Any]:
    """Everything of the page. `spare`: of the two replicas, the folder's name to log under."""
    config = folder / "slo.yaml"
    config.write_text(load.settings())
    logs = [folder / f"requests-{k}.jsonl" for k in (0, 1)]
    found: dict[str, Any] = {"load": load.said(), "rounds": []}
    with ExitStack() as stack:
        workers = []
        for k, log in enumerate(logs):
            log.unlink(missing_ok=True)
            flags = [*FLAGS, "--slo-config", str(config), "--slo-request-log", str(log)]
            with on_one_core(k):
                workers.append(stack.enter_context(server("slo", flags, folder / f"{spare}-{k}.log")))
        for worker in workers:
            print("alone", {k: dict(v) for k, v in played(worker, load, seed=-2).items()}, flush=True)
        with router(workers, folder) as at:
            found["router"] = through_router(at, logs)
            print(found["router"], flush=True)
        url = stack.enter_context(ray(workers, folder))
        _, body = load.request(1, seed=-3)
        same = [streamed(at, body) for at in (workers[0], url)]
        found["same"] = same[0] == same[1] and same[0][:2] == (True, True)
        print("a stream through Ray equals one without:", found["same"], flush=True)
        for number in range(rounds):
            row = {}
            for way, path in WAYS.items():
                row[way] = {k: dict(v) for k, v in played(url + path, load, number).items()}
                print(number, way, row[way], flush=True)
            found["rounds"].append(row)
        found["kill"] = killed_half_way(url, workers[0], load)
        print(found["kill"], flush=True)
    return found


def page(found: dict[str, Any]) -> str:
    """The page of the docs."""
    lines = ["| round | " + " | ".join(f"`{TIGHT}`, {way}" for way in WAYS) + " | loose, both ways |"]
    lines.append("|---|" + "---|" * (len(WAYS) + 1))
    total: Counter[str] = Counter()
    for number, row in enumerate(found["rounds"], 1):
        kept = {way: row[way][TIGHT].get("attained", 0) for way in WAYS}
        total.update(kept)
        loose = " and ".join(str(row[way][LOOSE].get("attained", 0)) for way in WAYS)
        lines.append(f"| {number} | " + " | ".join(str(kept[way]) for way in WAYS) + f" | {loose} |")
    lines.append("| all | " + " | ".join(str(total[way]) for way in WAYS) + " | |")
    a, b = (total[way] for way in ("by deadlines", "round robin"))
    lines += ["", f"By deadlines {a / b:.2f} times as many as in turns." if b else "In turns none at all."]
    ended = ", ".join(f"{n} {what}" for what, n in sorted(found["kill"].items()))
    kill = (
        f"In a last round one of the two replicas was killed half-way (SIGKILL): {ended}. "
        f"Requests that had not begun and were lost: {found['kill'].get('lost before it began', 0)}. "
        f"A stream through Ray had the same text as one without: "
        f"{'yes' if found['same'] else 'no'}."
    )
    tools = ", ".join([version_of("ray"), version_of("router", "sglang-router")])
    when = (
        f"{time.strftime('%Y-%m-%d')}, {tools}, "
        f"two servers with the demo model on {os.cpu_count()} CPU cores ({platform.machine()})"
    )
    text = Path(__file__).with_name("replicas.in.md").read_text()
    parts = {"when": when, "load": found["load"], "rounds": "\n".join(lines), "kill": kill}
    for name, part in {**parts, "router": found["router"]}.items():
        text = text.replace("{{" + name + "}}", part)
    return text


def main() -> int:
    """Entry point; returns the exit status: 1 if a request that had not begun was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="write the page of the docs here")
    parser.add_argument("--out", type=Path, default=Path("out/replicas"), help="folder for logs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=json.loads, default={}, help="fields of Load that differ, as JSON")
    parser.add_argument("--found", type=Path, help="found.json of an earlier run, instead of a new one")
    args = parser.parse_args()
    if args.found:
        found = json.loads(args.found.read_text())
    else:
        end_cleanly()
        folder = args.out.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, Load(**args.load), args.rounds, "server")
        (folder / "found.json").write_text(json.dumps(found, indent=1))
    if args.write:
        args.write.write_text(page(found))
    return int(bool(found["kill"].get("lost before it began")))


if __name__ == "__main__":
    sys.exit(main())
