"""A program: SGLang's arguments for models on a CUDA device that is not there, as JSON on the last line.

`python fake_cuda.py MAJOR.MINOR FOLDER...`: torch tells of a device of that compute capability, the kernels'
library is a stub, and each folder (a `config.json`) goes through our launcher's defaults and SGLang's checks.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import types
from typing import Any
from unittest.mock import MagicMock

import torch

MEMORY_BYTES = 80 << 30
FLAGS = ["--load-format", "dummy", "--skip-tokenizer-init"]


class NoKernels(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for `sgl_kernel`, whose library needs the CUDA driver."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        ours = name.split(".")[0] == "sgl_kernel"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = self.member  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""

    @staticmethod
    def member(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


def pretend(major: int, minor: int) -> None:
    """Make torch tell of one device of this compute capability."""
    card = types.SimpleNamespace(
        major=major, minor=minor, total_memory=MEMORY_BYTES, name="a card", multi_processor_count=100
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (major, minor),
        "get_device_name": card.name,
        "get_device_properties": card,
        "mem_get_info": (MEMORY_BYTES, MEMORY_BYTES),
        "set_device": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    sys.meta_path.insert(0, NoKernels())


def checked(folder: str) -> dict[str, Any]:
    """What a server for this model would be started with, or the error that SGLang ends with."""
    from sglang.srt.server_args import prepare_server_args

    from sglang_slo.attention import attention_line
    from sglang_slo.launch_server import given_flags, with_defaults
    from sglang_slo.runtime.sglang.settings import attention_backends, resolved

    argv = with_defaults(["--model-path", folder, *FLAGS])
    try:
        args = prepare_server_args(argv)
        stock = prepare_server_args(["--model-path", folder, *FLAGS])
    except Exception as error:
        return {"error": repr(error)}
    return {
        "backends": attention_backends(args),
        "stock": attention_backends(stock),
        "page_size": resolved(args).page_size,
        "line": attention_line(args, given_flags(argv)),
    }


if __name__ == "__main__":
    pretend(*map(int, sys.argv[1].split(".")))
    print(json.dumps([checked(folder) for folder in sys.argv[2:]]))
