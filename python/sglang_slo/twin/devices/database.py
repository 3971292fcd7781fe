"""The database of kernel times measured on real GPUs under SGLang, from `aiconfigurator-core` (extra `devices`).

Everything that is asked of that package is asked here. It looks kernels up by size and adds them up; a model that
it does not ship is not looked for on the network.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_slo.twin.devices.spec import DeviceError, DeviceSpec

PACKAGE = "aiconfigurator_core"
BACKEND = "sglang"
MB = 2**20


@dataclass(frozen=True)
class Memory:
    """Of one of the GPUs, bytes; `kv_per_token` is its part of a token's KV."""

    total: int
    weights: int
    kv_per_token: int


class Database:
    """The kernels of one model on one system. Times are milliseconds, as they come."""

    def __init__(self, spec: DeviceSpec) -> None:
        self.root = _root()
        self.model = _model(self.root, spec.model)
        systems = sorted(p.stem for p in (self.root / "systems").glob("*.yaml") if _has_kernels(p))
        if spec.system not in systems:
            raise DeviceError(f"device: system: need one of {', '.join(systems)}, got {spec.system!r}")
        self._spec = spec
        options: dict[str, Any] = {
            "tp_size": spec.tp,
            "moe_tp_size": spec.tp,
            "gemm_quant_mode": spec.quant,
            "kvcache_quant_mode": spec.kv,
        }
        with _quiet(), _named(spec):
            self.version = spec.version or self._current()
            handle = importlib.import_module(f"{PACKAGE}.sdk.engine").EngineHandle
            self._engine = handle.compile(
                self.model, spec.system, BACKEND, backend_version=self.version, **options
            )
            memory = importlib.import_module(f"{PACKAGE}.sdk.memory")
            found = memory.estimate_kv_cache(
                self.model,
                spec.system,
                BACKEND,
                self.version,
                max_num_tokens=8192,
                max_batch_size=1,
                memory_fraction_kind="of_total",
                memory_fraction_value=1.0,
                **options,
            )
        self.memory = Memory(
            int(found["total_gpu_capacity_bytes"]),
            int(found["memory_breakdown"]["weights_bytes"]),
            int(found["kv_size_per_token_bytes"]),
        )
        self.link_bytes_per_s = self._link()

    def _current(self) -> str:
        module = importlib.import_module(f"{PACKAGE}.sdk.perf_database")
        return str(module.resolve_query_version(self._spec.system, BACKEND, "current"))

    def _link(self) -> float:
        yaml = importlib.import_module("yaml")
        system = yaml.safe_load((self.root / "systems" / f"{self._spec.system}.yaml").read_text())
        return float(system["node"]["pcie_bw"])

    def layers_ms(self, tokens: int) -> float:
        """All but attention, of a pass with prefill and so many tokens."""
        return float(self._engine.mixed_step_breakdown(tokens, 0, tokens, 2, 0)[1])

    def decode_layers_ms(self, requests: int) -> float:
        """All but attention, of a pass of decodes alone."""
        return float(self._engine.decode_step_latency(requests, 2, 2)) - self.decode_attention_ms(requests, 2)

    def decode_attention_ms(self, requests: int, context: int) -> float:
        """Attention of so many decodes with this mean context."""
        return float(self._engine.mixed_step_breakdown(0, requests, context, 2, 0)[3])

    def prefill_attention_ms(self, new: int, history: int) -> float:
        """Attention of one chunk behind its history.

        The breakdown of a mixed step leaves the history out. A whole prefill does not, and history changes nothing
        but attention, so the difference of two prefills is what it adds.
        """
        alone = float(self._engine.mixed_step_breakdown(new, 0, new, 2, 0)[2])
        if not history:
            return alone
        behind = self._engine.predict_prefill_latency(1, new + history, history)
        return alone + float(behind) - float(self._engine.predict_prefill_latency(1, new, 0))


def samples_file() -> Path:
    """The serving runs on real GPUs that come with the database."""
    return _root() / "systems" / "silicon_sample.csv"


def _root() -> Path:
    try:
        module = importlib.import_module(PACKAGE)
    except ImportError as error:
        raise DeviceError(
            "device: measured kernels need aiconfigurator-core (pip install 'sglang-slo[devices]', Python 3.11 to "
            f"3.13): {error}"
        ) from error
    return Path(str(module.__file__)).parent


def _has_kernels(system: Path) -> bool:
    return any(
        (system.parent / "data" / system.stem / part / BACKEND).is_dir() for part in ("gemm", "attention")
    )


def _model(root: Path, asked: str) -> str:
    """The database's name of a model, or a folder with its config.json. Raises DeviceError."""
    if (Path(asked) / "config.json").is_file():
        return asked
    known = sorted(
        p.name.removesuffix("_config.json").replace("--", "/", 1)
        for p in (root / "model_configs").glob("*_config.json")
        if not p.name.endswith("_hf_quant_config.json")
    )
    same = [name for name in known if _plain(name) == _plain(asked)]
    same = same or [n for n in known if "/" not in asked and _plain(n.split("/", 1)[1]) == _plain(asked)]
    if not same:
        raise DeviceError(
            f"device: model: need a folder with config.json or one of {', '.join(known)}; got {asked!r}"
        )
    return same[0]


def _plain(name: str) -> str:
    """Names that have the same shape are the same: `Llama-3.1-8B-Instruct` is `Meta-Llama-3.1-8B`."""
    return name.lower().replace("meta-llama-", "llama-").removesuffix("-instruct")


@contextlib.contextmanager
def _named(spec: DeviceSpec) -> Iterator[None]:
    """What the database lacks is said as a DeviceError."""
    try:
        yield
    except DeviceError:
        raise
    except Exception as error:  # of many kinds: no such version, quantization or tensor-parallel size
        raise DeviceError(f"device: {spec}: not in the database: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """It is loud about where it takes its rows from."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
