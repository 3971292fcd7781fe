"""SGLang on a plain CPU: the platform that stands in where no accelerator is.

Everything runs on torch's own kernels, at page size 1; tensor parallelism over gloo. No CPU build of
sgl_kernel is needed. SGLang finds it through the entry point group `sglang.srt.platforms` (see
`plugin.cpu_platform`). Imports of SGLang's modules stay inside the methods, since many of them ask for the
platform while being imported.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

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

    def get_paged_allocator_cls(self) -> type:
        """One slot a token: SGLang's paged allocator needs triton, thus a GPU."""
        from sglang_slo.runtime.token_allocator import TokenAllocator

        return TokenAllocator

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
        if server_args.page_size not in (None, 1):
            raise ValueError(f"--page-size: accepted on a CPU: 1, got {server_args.page_size}")
        if server_args.enable_hierarchical_cache:
            raise ValueError("--enable-hierarchical-cache: needs CUDA streams; not accepted on a CPU")

    def init_backend(self) -> None:
        """Leave collectives to gloo. Called once in each worker, before the process groups are made."""
        from sglang.srt.distributed import parallel_state

        make_group = parallel_state.init_model_parallel_group

        @functools.wraps(make_group)
        def without_gpu_communicators(*args: Any, **kwargs: Any) -> Any:
            kwargs.update(use_pynccl=False, use_custom_allreduce=False)
            return make_group(*args, **kwargs)

        # SGLang asks for NCCL in every group of more than one rank, and NCCL asks for a GPU.
        parallel_state.init_model_parallel_group = without_gpu_communicators
