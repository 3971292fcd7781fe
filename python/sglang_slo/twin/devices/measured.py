"""A device made of kernels measured on real GPUs.

A pass takes the time of its layers (by tokens), of each chunk's attention (behind its own history), of the decodes'
attention (by their number and mean context), and of the host (`HostTimes`): kernels of one stream follow each other.
Chunks of one pass share their kernel launches, so the fixed part of attention is paid once.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import lru_cache

from sglang_slo.twin.devices.database import MB, Database
from sglang_slo.twin.devices.device import Pass
from sglang_slo.twin.devices.grid import Grid, Line, octaves
from sglang_slo.twin.devices.profiles import DATA, PROCESS_S, SCHEDULE_S
from sglang_slo.twin.devices.spec import DeviceError, DeviceSpec

MOST_CONTEXT = 1 << 17
MOST_CHUNK = 16_384
MOST_DECODES = 2048
SWAP_OVERHEAD_S = 5e-4
SWAP_EFFICIENCY = 0.85  # of the link's nominal bandwidth
# SGLang's own heuristics (`ServerArgs._handle_gpu_memory_settings`), MB
LARGE_GPU_MB = 160 * 1024
MID_GPU_MB = 60 * 1024


@dataclass(frozen=True)
class HostTimes:
    """What a pass takes beside its kernels: launches, sampling, and what else the host does not hide; seconds."""

    iteration_s: float = 0.0
    request_s: float = 0.0

    @staticmethod
    def fitted() -> HostTimes:
        """The two constants that `twin validate --fit` found on real serving runs."""
        raw = json.loads((DATA / "host.json").read_text())
        return HostTimes(float(raw["iteration_s"]), float(raw["request_s"]))


class MeasuredDevice:
    """A `Device`; about 10 microseconds a pass of a hundred requests."""

    measured = True

    def __init__(self, spec: DeviceSpec, host: HostTimes) -> None:
        database = Database(spec)
        self.spec, self.host, self.version = spec, host, database.version
        self.memory = database.memory
        self.name = f"{spec} (measured kernels, SGLang {database.version})"
        self.kv_bytes_per_token = float(database.memory.kv_per_token * spec.tp)
        self.swap_bytes_per_s = SWAP_EFFICIENCY * database.link_bytes_per_s * spec.tp
        self.swap_overhead_s = SWAP_OVERHEAD_S
        self.cpu_times_s = (SCHEDULE_S, PROCESS_S)
        self.kv_capacity_tokens = self.kv_capacity(None)
        sizes = [1, 2, 4, 8, *octaves(16, MOST_CHUNK, 4)]
        histories = [0, *octaves(64, MOST_CONTEXT, 1)]
        self._layers = Line(database.layers_ms)
        self._decode_layers = Line(database.decode_layers_ms)
        self._chunk = Grid(database.prefill_attention_ms, sizes, histories)
        counts = [1, 2, 4, 8, *octaves(16, MOST_DECODES, 2)]
        self._decode = Grid(database.decode_attention_ms, counts, octaves(16, MOST_CONTEXT, 1))
        self._launch_ms = self._chunk.at(1, 0)

    def iteration_s(self, load: Pass) -> float:
        """See the module."""
        decodes = len(load.contexts)
        ms = self._decode.at(decodes, sum(load.contexts) / decodes) if decodes else 0.0
        if load.chunks:
            ms += self._layers.at(load.new_tokens)
            ms += sum(self._chunk.at(new, history) for history, new in load.chunks)
            ms -= self._launch_ms * (len(load.chunks) - 1)
        else:
            ms += self._decode_layers.at(load.new_tokens)
        return ms / 1e3 + self.host.iteration_s + self.host.request_s * load.requests

    @property
    def chunk_tokens(self) -> int:
        """SGLang's default chunk on a GPU of this size."""
        megabytes = self.memory.total / MB
        return 16_384 if megabytes >= LARGE_GPU_MB else 8192 if megabytes >= MID_GPU_MB else 4096

    def kv_capacity(self, mem_fraction: float | None) -> int:
        """Tokens of KV with `--mem-fraction-static` (None: SGLang's default): that share of memory holds both."""
        megabytes = self.memory.total / MB
        if mem_fraction is None:
            graphs = 2 * (512 if self.spec.tp >= 4 or megabytes >= LARGE_GPU_MB else 256)
            reserved = 512 + 1.5 * self.chunk_tokens + self.spec.tp / 8 * 1024 + graphs
            mem_fraction = 1 - max(reserved, 10 * 1024 if megabytes > MID_GPU_MB else 0) / megabytes
        room = self.memory.total * mem_fraction - self.memory.weights
        tokens = int(room / self.memory.kv_per_token)
        if tokens < 1024:
            raise DeviceError(
                f"device: {self.spec}: the weights leave room for {max(tokens, 0)} tokens of KV at "
                f"--mem-fraction-static {mem_fraction:.3g}; need at least 1024: a larger tp, or quant"
            )
        return tokens


@lru_cache(maxsize=4)
def _without_host(spec: DeviceSpec) -> MeasuredDevice:
    return MeasuredDevice(spec, HostTimes())


def measured(spec: DeviceSpec, host: HostTimes | None = None) -> MeasuredDevice:
    """The device of a spec, its tables built once a process (some three seconds). Raises DeviceError."""
    device = copy.copy(_without_host(spec))
    device.host = HostTimes.fitted() if host is None else host
    return device
