"""What operations do to a server: crowds, full disks, killed and stopped processes, clients that do not read.

Each function starts a server of its own, does one thing, and says whether every client had an answer and the next
request was served. Nothing outside the server's own processes and a folder of our own is touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from campaign.serving import Answer, Check, Client, Serving, serving

Told = dict[str, Any]  # what /slo/status tells of a replica
SMALL = ["--max-total-tokens", "4000"]
DISK = "96k"  # of the disk that fills up
STOP_S = 5.0
END_S = 120.0  # a server without one of its processes has ended by then; SGLang waits a minute for dumps of the GPU's memory


def crowd(folder: Path, count: int = 5000) -> Check:
    """So many requests at once."""
    with serving("slo", SMALL, folder / "crowd.log") as server:

        async def go() -> tuple[Counter[str], bool]:
            async with Client(server.url, 1024) as client:
                asked = (client.generate(_ids(n), 2, limit_s=600) for n in range(count))
                return _told(await asyncio.gather(*asked)), await client.alive()

        told, alive = asyncio.run(go())
    return Check(
        f"{count} queued", alive and set(told) <= {"200", "503"}, f"{dict(told)}, then served: {alive}"
    )


def full_log(folder: Path) -> Check:
    """The disk under the request log fills up."""
    name = "full disk under the request log"
    with _small_disk(folder / "log-disk") as disk:
        if disk is None:
            return Check(name, None, "no small disk could be mounted here")
        flags = [*SMALL, "--slo-request-log", str(disk / "requests.jsonl")]
        with serving("slo", flags, folder / "full-log.log") as server:
            told, status = asyncio.run(_serve(server, 600))
    lost = status.get("request_log_rows_lost")
    return Check(
        name,
        set(told) == {"200"} and bool(lost),
        f"{dict(told)}; rows that were lost, by its own count: {lost}",
    )


def full_models(folder: Path) -> Check:
    """The disk under the folder of the length model fills up."""
    name = "full disk under the model folder"
    with _small_disk(folder / "model-disk") as disk:
        if disk is None:
            return Check(name, None, "no small disk could be mounted here")
        (disk / "filler").write_bytes(b"x" * 40_000)
        with serving("slo", [*SMALL, "--slo-model-dir", str(disk)], folder / "full-models.log") as server:
            told, status = asyncio.run(_serve(server, 700))
    return Check(name, set(told) == {"200"}, f"{dict(told)}; {_plans(status)}")


def killed_training(folder: Path) -> Check:
    """The child that trains is killed as soon as it is there."""
    flags = [*SMALL, "--slo-model-dir", str(folder / "killed-training")]
    killed = 0
    with serving("slo", flags, folder / "killed-training.log") as server:
        total: Counter[str] = Counter()
        status: Told = {}
        for _ in range(12):
            told, status = asyncio.run(_serve(server, 120))
            total += told
            for _ in range(40):
                child = server.processes().get("trainer")
                if child is not None:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                        killed += 1
                    break
                time.sleep(0.05)
    held = None if not killed else set(total) == {"200"}
    return Check("killed training child", held, f"killed {killed} times; {dict(total)}; {_plans(status)}")


def shared_models(folder: Path) -> Check:
    """Two servers learn in one folder."""
    flags = [*SMALL, "--slo-model-dir", str(folder / "shared-models"), "--sleep-on-idle"]
    with (
        serving("slo", flags, folder / "shared-1.log") as one,
        serving("slo", flags, folder / "shared-2.log") as two,
    ):

        async def both() -> list[tuple[Counter[str], Told]]:
            return list(await asyncio.gather(_serve(one, 500), _serve(two, 500)))

        (told, status), (told2, status2) = asyncio.run(both())
    with serving("slo", flags, folder / "shared-3.log") as third:
        after, _ = asyncio.run(_serve(third, 20))
    fine = set(told) | set(told2) | set(after) == {"200"}
    detail = (
        f"{dict(told)}, {dict(told2)}, a third one later {dict(after)}; {_plans(status)}; {_plans(status2)}"
    )
    return Check("two servers on one model folder", fine, detail)


def stalled_readers(folder: Path, count: int = 40) -> Check:
    """Clients that ask for a stream and never read it."""
    with serving("slo", SMALL, folder / "stalled.log") as server:

        async def go() -> tuple[Counter[str], Told]:
            host, port = server.url.removeprefix("http://").split(":")
            body = b'{"text":"a","stream":true,"sampling_params":{"max_new_tokens":400,"ignore_eos":true}}'
            head = f"POST /generate HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: "
            writers = []
            for _ in range(count):
                _, writer = await asyncio.open_connection(host, int(port), limit=256)
                writer.write(head.encode() + f"{len(body)}\r\n\r\n".encode() + body)
                writers.append(writer)
            told, _ = await _serve(server, 60)
            for writer in writers:
                writer.close()
            async with Client(server.url) as client:
                return told, await client.calm()

        told, status = asyncio.run(go())
    running = (status.get("now") or {}).get("running")
    return Check(
        "clients that do not read",
        set(told) == {"200"} and running == 0,
        f"{dict(told)}, {running} still run",
    )


def killed(folder: Path, role: str) -> Check:
    """SIGKILL to one process: no client waits for ever, and the server ends so that it can be started anew."""
    with serving("slo", SMALL, folder / f"killed-{role}.log") as server:
        victim = server.processes().get(role)
        if victim is None:
            return Check(f"SIGKILL of the {role}", None, "there is no such process")

        async def go() -> Counter[str]:
            async with Client(server.url) as client:
                asked = [asyncio.create_task(client.generate(_ids(n), 400, limit_s=END_S)) for n in range(20)]
                await asyncio.sleep(1.0)
                victim.kill()
                return _told(await asyncio.gather(*asked))

        told = asyncio.run(go())
        ended = server.gone(END_S)
    hung = told.get("TimeoutError", 0)
    return Check(f"SIGKILL of the {role}", ended and not hung, f"{dict(told)}, the server has ended: {ended}")


def stopped(folder: Path, role: str) -> Check:
    """SIGSTOP to one process for a while, then SIGCONT: everyone is served."""
    with serving("slo", SMALL, folder / f"stopped-{role}.log") as server:
        victim = server.processes().get(role)
        if victim is None:
            return Check(f"SIGSTOP of the {role}", None, "there is no such process")

        async def go() -> tuple[Counter[str], bool]:
            async with Client(server.url) as client:
                asked = [asyncio.create_task(client.generate(_ids(n), 200)) for n in range(20)]
                await asyncio.sleep(0.5)
                victim.send_signal(signal.SIGSTOP)
                try:
                    await asyncio.sleep(STOP_S)
                finally:
                    victim.send_signal(signal.SIGCONT)
                return _told(await asyncio.gather(*asked)), await client.alive()

        told, alive = asyncio.run(go())
    return Check(f"SIGSTOP of the {role} for {STOP_S:g} s", alive and set(told) == {"200"}, f"{dict(told)}")


def harm(folder: Path, crowd_size: int, say: Callable[[str], None], only: str = "") -> list[Check]:
    """All of them, one after the other; `only`: those whose name contains it."""
    jobs: list[tuple[str, Callable[[], Check]]] = [
        ("crowd", lambda: crowd(folder, crowd_size)),
        ("full_log", lambda: full_log(folder)),
        ("full_models", lambda: full_models(folder)),
        ("killed_training", lambda: killed_training(folder)),
        ("shared_models", lambda: shared_models(folder)),
        ("stalled_readers", lambda: stalled_readers(folder)),
    ]
    for role in ("scheduler", "detokenizer", "launcher"):
        jobs.append((f"killed_{role}", lambda role=role: killed(folder, role)))  # type: ignore[misc]
        jobs.append((f"stopped_{role}", lambda role=role: stopped(folder, role)))  # type: ignore[misc]
    checks = []
    for name, job in jobs:
        if only in name:
            say(f"harm: {name}")
            try:
                checks.append(job())
            except Exception as error:  # the server did not start, or the like: no finding, but no silence
                checks.append(
                    Check(name, False, f"could not be carried out: {type(error).__name__}: {error}")
                )
    return checks


# -- pieces


def _ids(n: int) -> list[int]:
    rng = random.Random(n)
    return [rng.randrange(10, 500) for _ in range(rng.choice([5, 20, 60]))]


def _told(answers: list[Answer]) -> Counter[str]:
    return Counter(str(a.status or a.body) for a in answers)


def _plans(status: Told) -> str:
    return f"{(status.get('fallbacks') or {}).get('count')} fallbacks, {status.get('observer_errors')} errors in observing"


async def _serve(server: Serving, count: int) -> tuple[Counter[str], Told]:
    """So many short requests, sixteen at a time; what was answered and what /slo/status tells then."""
    async with Client(server.url, 16) as client:
        told: Counter[str] = Counter()
        for start in range(0, count, 200):
            some = range(start, min(start + 200, count))
            told += _told(await asyncio.gather(*(client.generate(_ids(n), 1 + n % 7) for n in some)))
        await asyncio.sleep(2)
        return told, await client.replica()


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of a few KiB; None where we may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "campaign", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
