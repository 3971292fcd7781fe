"""The latency profile that a server measures of this device as it starts: all that its scheduler knows of it.

The same cases as a real start-up (`runtime.measure.cases`), each timed on the device in virtual time, and the same fit
(`runtime.profile.model_of`). Kept on disk under everything it depends on.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from sglang_slo.core.latency import LatencyModel, ProfileError
from sglang_slo.cpu.demo_model import cache_dir
from sglang_slo.twin.devices.device import Pass
from sglang_slo.twin.devices.measured import MeasuredDevice

SLOTS = 2048
CONTEXT_TOKENS = 1 << 17
_SOURCES = (
    *(f"core/{n}.py" for n in ("latency", "fit", "samples")),
    *(f"runtime/latency/{n}.py" for n in ("measure", "startup_profile")),
)


def startup_profile(device: MeasuredDevice) -> LatencyModel:
    """Fitted to the start-up cases, with the device's KV capacity and link."""
    path = cache_dir() / "twin" / "devices" / f"{_key(device)}.json"
    if path.exists():
        try:
            return LatencyModel.load(path)
        except ProfileError:
            pass  # written by another version: measured anew
    model = _measure(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(path)
    return model


def _measure(device: MeasuredDevice) -> LatencyModel:
    # SGLang comes in here, and only the first time a device is used.
    import sglang_slo.twin.platform as twin_platform

    twin_platform.settle()
    from sglang_slo.runtime.latency.measure import cases
    from sglang_slo.runtime.latency.startup_profile import model_of

    timed = []
    for case in cases(device.kv_capacity_tokens // 2, SLOTS, device.chunk_tokens, CONTEXT_TOKENS):
        load = Pass(case.chunks, (case.context,) * case.decodes)
        timed.append((load.shape, device.iteration_s(load)))
    return replace(
        model_of(timed, {"model": device.name}),
        kv_capacity_tokens=device.kv_capacity_tokens,
        kv_bytes_per_token=device.kv_bytes_per_token,
        swap_bytes_per_s=device.swap_bytes_per_s,
        swap_overhead_s=device.swap_overhead_s,
    )


def _key(device: MeasuredDevice) -> str:
    root = Path(__file__).parents[2]
    digest = hashlib.sha256(repr((device.name, device.host, device.kv_capacity_tokens)).encode())
    for source in [root / name for name in _SOURCES] + sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]
