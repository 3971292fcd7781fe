"""SGLang on a plain CPU: the platform that stands in where no accelerator is.

Everything runs on torch's own kernels; tensor parallelism over gloo. No CPU build of
sgl_kernel is needed. SGLang finds it through the entry point group `sglang.srt.platforms` (see
`plugin.cpu_platform`). Imports of SGLang's modules stay inside the methods, since many of them ask for the
platform while being imported.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from sglang_slo.cpu import hierarchical

logger = logging.getLogger(__name__)


class NativeCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Out-of-tree platform: every operator that has variants takes its `forward_native`."""

    _enum = PlatformEnum.OOT

    def get_device(self, device_id: int | None = None) -> str:
        """The one CPU device, as the text that `ServerArgs.device` holds."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        """torch's scaled_dot_product_attention, request by request."""
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        """SGLang's own pool of multi-head K and V."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_mla_kv_pool_cls(self) -> type:
        """SGLang's own pool of latent K and V."""
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

        return MLATokenToKVPool

    def get_paged_allocator_cls(self) -> Callable[..., Any]:
        """What makes an allocator of any page size: SGLang's own for pages needs triton, thus a GPU."""
        from sglang_slo.cpu.allocator import allocator

        return allocator

    def get_compile_backend(self, mode: str | None = None) -> str:
        """No compilation."""
        return "eager"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what is left open, and refuse what cannot run here. Raises ValueError naming the flag."""
        if server_args.device != "cpu":
            raise ValueError(f"--device: no GPU was found; accepted here: cpu, got {server_args.device!r}")
        if server_args.attention_backend in (None, "intel_amx"):  # SGLang's own default for --device cpu
            server_args.attention_backend = self.get_default_attention_backend()
        server_args.sampling_backend = "pytorch"
        if server_args.enable_hierarchical_cache:
            for name, value in hierarchical.SETTINGS.items():
                setattr(server_args, name, value)

    def init_backend(self) -> None:
        """Leave collectives to gloo and memory unpinned. Called once in each worker, first of all."""
        from sglang.srt.distributed import parallel_state

        from sglang_slo.cpu import attention

        unpin()
        hierarchical.install()
        apply_grammars_here()
        attention.install()
        make_group = parallel_state.init_model_parallel_group

        @functools.wraps(make_group)
        def without_gpu_communicators(*args: Any, **kwargs: Any) -> Any:
            kwargs.update(use_pynccl=False, use_custom_allreduce=False)
            return make_group(*args, **kwargs)

        # SGLang asks for NCCL in every group of more than one rank, and NCCL asks for a GPU.
        parallel_state.init_model_parallel_group = without_gpu_communicators


def unpin() -> None:
    """Make requests for pinned memory do nothing: without a GPU torch refuses what LoRA and grammars ask."""
    import torch

    torch.Tensor.pin_memory = lambda tensor, *args, **kwargs: tensor
    for name in ("tensor", "empty", "zeros", "ones", "full", "empty_like", "zeros_like"):
        setattr(torch, name, _unpinned(getattr(torch, name)))


def _unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return made


def apply_grammars_here() -> None:
    """Let grammars mask logits on the CPU: SGLang's xgrammar backend knows GPUs only, xgrammar both."""
    import xgrammar
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar

    def apply_vocab_mask(grammar: Any, logits: Any, vocab_mask: Any) -> None:
        xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)

    XGrammarGrammar.apply_vocab_mask = apply_vocab_mask
