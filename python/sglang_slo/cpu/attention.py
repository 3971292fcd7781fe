"""Attention on a plain CPU at the cost that it should have, and for layers that look back over a window at all.

SGLang's torch_native backend gives each request as many query rows as it has KV and throws all but the new ones
away: a chunk behind h tokens of history costs (h + n)^2 instead of n (h + n), and a decode that shares a batch with
prefill costs as much as its whole prompt did. Cutting prompts and mixing batches, which any scheduler that keeps gaps
short must do, would then cost many times what it costs on a GPU. Same result, up to rounding.
KV of layers with a window lies in a pool of its own, which the backend writes, but reads at the other pool's slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def extend(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    scaling: float | None,
    enable_gqa: bool,
    causal: bool,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of each request's new tokens to all of its KV, or to the `window` tokens before each and itself, written
    to `output`.

    query, output: [tokens, heads, head size], requests one after the other; k_cache, v_cache: [pool, KV heads, head
    size]; req_to_token: [rows, longest context], pool slots; the others [requests].
    """
    start = 0
    lengths = zip(req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), strict=True)
    for row, total, new in lengths:
        slots = req_to_token[row, :total]
        q = query[start : start + new].transpose(0, 1)
        k, v = (cache[slots].transpose(0, 1).to(query.dtype) for cache in (k_cache, v_cache))
        mask = _mask(new, total, causal, window)
        attended = scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=mask,
            is_causal=causal and mask is None and new == total,
            scale=scaling,
            enable_gqa=enable_gqa,
        )
        output[start : start + new] = attended[0].transpose(0, 1)
        start += new
    return output


def _mask(new: int, total: int, causal: bool, window: int | None) -> torch.Tensor | None:
    """Which of `total` tokens each of the last `new` sees, bool[new, total]; None: what SDPA does without a mask."""
    if causal and window is not None and window < total:
        return torch.ones(new, total, dtype=torch.bool).tril(total - new).triu(total - new - window)
    if causal and 1 < new < total:
        return torch.ones(new, total, dtype=torch.bool).tril(total - new)
    return None


class _WindowSlots:
    """A table of slots, read as slots of the window's pool."""

    def __init__(self, slots: torch.Tensor, translated: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._slots, self._translated = slots, translated

    def __getitem__(self, place: Any) -> torch.Tensor:
        return self._translated(self._slots[place])


def _in_its_pool(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of the backend, with KV read where it was written."""

    @functools.wraps(forward)
    def run(self: Any, q: Any, k: Any, v: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        pool, rows = self.token_to_kv_pool, self.req_to_token_pool
        if (
            not getattr(self, "use_sliding_window_kv_pool", False)
            or not pool.layers_mapping[layer.layer_id][1]
        ):
            return forward(self, q, k, v, layer, *args, **kwargs)
        slots = _WindowSlots(rows.req_to_token, pool.translate_loc_from_full_to_swa)
        self.req_to_token_pool = SimpleNamespace(req_to_token=slots)
        try:
            return forward(self, q, k, v, layer, *args, **kwargs)
        finally:
            self.req_to_token_pool = rows

    return run


def install() -> None:
    """Put both into SGLang's backend, for all that they cover: no cross-attention."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    theirs = TorchNativeAttnBackend._run_sdpa_forward_extend

    def run(
        self: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        pools = (query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens)
        if encoder_lens is not None or is_cross_attn:
            rest = (encoder_lens, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size)
            return theirs(self, *pools, extend_prefix_lens, extend_seq_lens, *rest)
        windowed = sliding_window_size is not None and sliding_window_size > -1
        window = sliding_window_size if windowed else None
        return extend(*pools, extend_seq_lens, scaling, enable_gqa, causal, window)

    TorchNativeAttnBackend._run_sdpa_forward_extend = run
    for name in ("forward_extend", "forward_decode"):
        forward = getattr(TorchNativeAttnBackend, name)
        if not hasattr(forward, "__wrapped__"):  # once in a process
            setattr(TorchNativeAttnBackend, name, _in_its_pool(forward))
