"""What all parts of a measurement share: folders, sizes, the clock of the part, servers, rounds, and saved
results.

Every run is saved as its own JSON the moment it ends, and a run that is already saved is not repeated: a
part that was cut off goes on where it stopped when it is asked for again, also on another machine with the
folder carried over.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from child_process import free_port
from gpurun.model import KV_BYTES_PER_TOKEN, WEIGHT_BYTES, model_folder
from gpurun.server import OURS, STOCK, Arm, Server

HOME = Path(__file__).resolve().parents[3]  # of the unpacked bundle, or of the checkout
CUDA_OVERHEAD_BYTES = 6e9  # CUDA context, graphs and activations of one server
FIRST_RUN_S = 20.0  # guess of a run's length before one was seen


class OutOfTimeError(RuntimeError):
    """The part's time does not allow another run; what was measured is saved."""


@dataclass(frozen=True)
class Sizes:
    """How much is run: enough to mean something on a GPU, just enough to go every way once on a CPU."""

    bench_prompts: int
    bench_input_tokens: int
    bench_output_tokens: int
    saturation_prompts: int
    saturation_input_tokens: int
    saturation_output_tokens: int
    span_s: float  # arrivals of one replay
    max_requests: int
    pressure_kv_tokens: int
    pressure_requests: int


SIZES = {
    "cuda": Sizes(128, 1024, 128, 512, 512, 256, 35.0, 400, 12_000, 120),
    "cpu": Sizes(6, 64, 8, 12, 48, 12, 4.0, 12, 1_536, 12),
}
ARMS = {
    "stock": Arm("stock", STOCK),
    "tuned": Arm(
        "tuned", STOCK, ("--schedule-policy", "lpm", "--enable-mixed-chunk", "--chunked-prefill-size", "512")
    ),
    "ours": Arm("ours", OURS, ("--slo-policy", "slo")),
}


@dataclass
class Run:
    """One part being run. Times are seconds on the monotonic clock."""

    device: str
    out: Path
    work: Path
    rounds: int = 3
    arms: tuple[str, ...] = ("stock", "ours")
    loads: tuple[float, ...] = ()
    deadline: float = float("inf")
    sizes: Sizes = field(default=SIZES["cpu"])
    longest_s: float = FIRST_RUN_S

    @property
    def left_s(self) -> float:
        """Seconds this part may still use."""
        return self.deadline - time.monotonic()

    @property
    def data(self) -> Path | None:
        """Folder of traces, if the bundle was packed with them."""
        folder = HOME / "data"
        return folder if any(folder.glob("*.csv")) else None

    @property
    def profile(self) -> Path:
        """Where part `profile` leaves the measured latency profile."""
        return self.out / "profile" / "profile.json"

    # -- results

    def path(self, part: str, name: str) -> Path:
        """File of one saved run."""
        return self.out / part / f"{name}.json"

    def save(self, part: str, name: str, content: dict[str, Any]) -> None:
        """Save one run, whole or not at all."""
        path = self.path(part, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)

    def load(self, part: str, name: str) -> Any:
        """A saved run, None if there is none."""
        path = self.path(part, name)
        return json.loads(path.read_text()) if path.exists() else None

    def rounds_of(self, part: str, names: Sequence[str], suffix: str = "") -> Iterator[tuple[str, str]]:
        """(arm, name of the run), alternating, the order turned over every round; saved ones are passed over.

        Raises OutOfTimeError when what is left is less than the longest run so far needs.
        """
        for number in range(1, self.rounds + 1):
            for arm in names if number % 2 else tuple(reversed(names)):
                name = f"{arm}{suffix}-{number}"
                if self.path(part, name).exists():
                    continue
                if self.left_s < 1.2 * self.longest_s:
                    raise OutOfTimeError(f"{part}: {name} and later ones not run: {self.left_s:.0f} s left")
                begin = time.monotonic()
                yield arm, name
                self.longest_s = max(self.longest_s, time.monotonic() - begin)

    def finished(self, part: str, names: Sequence[str], suffix: str = "") -> bool:
        """True if every round of every arm is saved."""
        return all(
            self.path(part, f"{a}{suffix}-{n}").exists() for a in names for n in range(1, self.rounds + 1)
        )

    # -- servers

    def flags(self, count: int, kv_tokens: int | None = None) -> list[str]:
        """SGLang's flags for every arm when `count` servers share the device."""
        model = str(model_folder(self.device, self.work))
        flags = [
            "--model-path",
            model,
            "--load-format",
            "dummy",
            "--host",
            "127.0.0.1",
            "--grammar-backend",
            "none",
            "--enable-metrics",
            "--sleep-on-idle",
            "--random-seed",
            "1",
        ]
        if self.device == "cpu":
            flags += [
                "--device",
                "cpu",
                "--attention-backend",
                "torch_native",
                "--sampling-backend",
                "pytorch",
                "--dtype",
                "float32",
                "--max-total-tokens",
                str(kv_tokens or 16_384),
            ]
        else:
            flags += [
                "--attention-backend",
                "flashinfer",
                "--mem-fraction-static",
                "0.88",
                "--watchdog-timeout",
                "900",
            ]  # the first pass of a shape may compile
            flags += ["--max-total-tokens", str(kv_tokens or shared_kv_tokens(device_bytes(), count))]
        return flags

    @contextmanager
    def servers(self, arms: Sequence[Arm], kv_tokens: int | None = None) -> Iterator[dict[str, Server]]:
        """All arms' servers alive at once with equal KV pools, so that runs can alternate without restarts.

        Only one of them is given work at a time. Each is warmed up before it is handed out.
        """
        flags = self.flags(len(arms), kv_tokens)
        with ExitStack() as stack:
            alive: dict[str, Server] = {}
            for arm in arms:
                server = Server(arm, free_port(), self.out / "logs" / f"{arm.name}.log")
                stack.callback(server.stop)
                more = (
                    ["--slo-profile", str(self.profile)]
                    if arm.module == OURS and self.profile.exists()
                    else []
                )
                limit_s = max(self.left_s - 10, 1)
                alive[arm.name] = server.start(flags + more, self.server_env(), limit_s)
                generate(server, 64, 16)
            yield alive

    def server_env(self) -> dict[str, str]:
        """Environment of every server: caches under the work folder; on a GPU SGLang's timer of forward passes."""
        timer = {"SGLANG_ENABLE_METRICS_DEVICE_TIMER": "1"} if self.device == "cuda" else {}
        return {"SGLANG_SLO_CACHE_DIR": str(self.work / "cache"), **timer}

    # -- tools

    def python(self, *command: str, limit_s: float | None = None) -> str:
        """Output of `python COMMAND`. Raises RuntimeError with its last words if it fails or is too slow."""
        allowed = max(min(limit_s or self.left_s, self.left_s), 1)
        try:
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=allowed)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{' '.join(command[:3])}: not done after {allowed:.0f} s") from error
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command[:3])}: ended with {done.returncode}\n{done.stderr[-2000:]}"
            )
        return done.stdout


def generate(server: Server, prompt_tokens: int, new_tokens: int) -> list[int]:
    """Greedy output ids for a fixed prompt of ids."""
    prompt = [3 + (7 * i) % 500 for i in range(prompt_tokens)]
    params = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return list(server.post("/generate", {"input_ids": prompt, "sampling_params": params})["output_ids"])


def device_bytes() -> float:
    """Memory of the first GPU."""
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory)


def shared_kv_tokens(total_bytes: float, count: int) -> int:
    """KV tokens for each of `count` equal servers on a device of `total_bytes`. ValueError if none."""
    # 92 % of the card is split evenly; each share first holds the weights and what CUDA itself takes.
    tokens = int((0.92 * total_bytes / count - WEIGHT_BYTES - CUDA_OVERHEAD_BYTES) / KV_BYTES_PER_TOKEN)
    if tokens < 4096:
        raise ValueError(f"{count} servers of this model do not fit a device of {total_bytes / 1e9:.0f} GB")
    return tokens
