"""What must import before anything is started, and what is missing in words.

Three groups: what the host brings, what the bundle brings, and what SGLang itself imports on a CUDA device.
The last group differs from what it imports on a CPU; `pretend_cuda` makes SGLang take the CUDA branches
where there is no GPU, so that a bundle can be checked before it travels (sgl_kernel then still needs some
libcuda.so.1 to link against).
"""

from __future__ import annotations

import importlib
import shutil
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from types import SimpleNamespace
from typing import Any

HOST = (
    "torch",
    "triton",
    "numpy",
    "scipy",
    "aiohttp",
    "requests",
    "psutil",
    "yaml",
    "pyarrow",
    "pandas",
    "PIL",
    "prometheus_client",
    "uvloop",
    "einops",
    "sentencepiece",
    "tiktoken",
    "matplotlib",
)
BUNDLE = ("sglang", "sglang_slo", "flashinfer", "tvm_ffi", "transformers", "tokenizers", "zmq", "xgboost")
ENGINE = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.llama",
    "sglang.bench_serving",
    "sglang_slo.launch_server",
    "sglang_slo.runtime.scheduler.scheduler",
)
CUDA_ONLY = (
    "sgl_kernel",
    "sglang.srt.layers.attention.flashinfer_backend",
    "flashinfer.prefill",
    "flashinfer.decode",
    "flashinfer.sampling",
)
COMMANDS = {"nvcc": "compiles FlashInfer's kernels", "ninja": "builds them", "nvidia-smi": "names the device"}
PLUGIN_GROUPS = ("sglang.srt.platforms", "sglang.srt.plugins")


def missing(device: str) -> list[str]:
    """One line for each thing that is not there; empty if all is."""
    faults = [
        f"command {name}: not on PATH; it {why}"
        for name, why in COMMANDS.items()
        if device == "cuda" and not shutil.which(name)
    ]
    for group, modules in (("host", HOST), ("bundle", BUNDLE)):
        faults += [f"{group}: {fault}" for fault in map(_import_fault, modules) if fault]
    for group in PLUGIN_GROUPS:
        if not any(entry.value.startswith("sglang_slo.") for entry in entry_points(group=group)):
            faults.append(
                f"bundle: no entry point of sglang_slo in {group} (is its dist-info on PYTHONPATH?)"
            )
    if faults:
        return faults  # SGLang's own imports would only repeat them
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return ["device: torch sees no GPU; --device cpu runs everything small on the CPU"]
    engine = ENGINE + (CUDA_ONLY if device != "cpu" else ())
    return [f"engine: {fault}" for fault in map(_import_fault, engine) if fault]


def pretend_cuda() -> None:
    """Make torch answer as if one Hopper GPU were there. For import checks only: nothing can run after it."""
    import torch

    card = SimpleNamespace(
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=150 << 30,
        name="Hopper",
        L2_cache_size=60 << 20,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": card.name,
        "get_device_properties": card,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_args, _answer=answer, **_kwargs: _answer)


def versions() -> dict[str, str]:
    """Versions of what a figure may depend on."""
    names = (
        "torch",
        "triton",
        "numpy",
        "sglang",
        "sglang-kernel",
        "flashinfer-python",
        "transformers",
        "xgboost-cpu",
        "sglang-slo",
    )
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def _import_fault(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # any: a broken package may raise whatever it likes
        text = " ".join(str(error).split())
        return f"{module}: {type(error).__name__}: {text[:300]}"
    return None
