"""SGLang's hierarchical cache on a plain CPU: host memory that is as good as the device's, and copies that are torch's own.

Its host pools are registered with CUDA and copied by kernels; nothing else of it needs a GPU. Covers pools of multi-head
K and V in SGLang's layer-first layout, which `settings` asks for.
"""

from __future__ import annotations

from typing import Any

import torch

SETTINGS = {
    "hicache_io_backend": "direct",
    "hicache_mem_layout": "layer_first",
}  # copies by index, layer by layer


def install() -> None:
    """Put torch's copies in the place of the kernels."""
    from sglang.srt.mem_cache.pool_host import base, common
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    common._cuda_host_register = lambda *args, **kwargs: None
    common._cuda_host_unregister = lambda *args, **kwargs: None
    base._cuda_host_unregister = common._cuda_host_unregister
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = (
        0  # what a server with GPUs leaves to others is a small machine's all
    )
    # by name: the twin puts its own in their place
    MHATokenToKVPoolHost.load_to_device_per_layer = lambda *args, **kwargs: load(*args, **kwargs)
    MHATokenToKVPoolHost.backup_from_device_all_layer = lambda *args, **kwargs: save(*args, **kwargs)


def load(
    host_pool: Any,
    device_pool: Any,
    host_indices: torch.Tensor,
    device_indices: torch.Tensor,
    layer_id: int,
    io_backend: str,
    **_: Any,
) -> None:
    """One layer's KV of host slots `host_indices` to device slots `device_indices`, int64[n] both."""
    for device, host in zip((device_pool.k_buffer, device_pool.v_buffer), host_pool.kv_buffer, strict=True):
        device[layer_id][device_indices] = host[layer_id][host_indices]


def save(
    host_pool: Any,
    device_pool: Any,
    host_indices: torch.Tensor,
    device_indices: torch.Tensor,
    io_backend: str,
) -> None:
    """All layers' KV of device slots `device_indices` to host slots `host_indices`, int64[n] both."""
    for device, host in zip((device_pool.k_buffer, device_pool.v_buffer), host_pool.kv_buffer, strict=True):
        for layer_id in range(len(device)):
            host[layer_id][host_indices] = device[layer_id][device_indices]
