"""Prefill attention on a plain CPU at the cost that it should have.

SGLang's torch_native backend gives each request as many query rows as it has KV and throws all but the new ones
away: a chunk behind h tokens of history costs (h + n)^2 instead of n (h + n), and a decode that shares a batch with
prefill costs as much as its whole prompt did. Cutting prompts and mixing batches, which any scheduler that keeps gaps
short must do, would then cost many times what it costs on a GPU. Same result, up to rounding.
"""

from __future__ import annotations

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
) -> torch.Tensor:
    """Attention of each request's new tokens to all of its KV, written to `output`.

    query, output: [tokens, heads, head size], requests one after the other; k_cache, v_cache: [pool, KV heads, head
    size]; req_to_token: [rows, longest context], pool slots; the others [requests].
    """
    start = 0
    lengths = zip(req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), strict=True)
    for row, total, new in lengths:
        slots = req_to_token[row, :total]
        q = query[start : start + new].transpose(0, 1)
        k, v = (cache[slots].transpose(0, 1).to(query.dtype) for cache in (k_cache, v_cache))
        behind = causal and 1 < new < total
        mask = torch.ones(new, total, dtype=torch.bool).tril(total - new) if behind else None
        attended = scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=mask,
            is_causal=causal and new == total,
            scale=scaling,
            enable_gqa=enable_gqa,
        )
        output[start : start + new] = attended[0].transpose(0, 1)
        start += new
    return output


def install() -> None:
    """Put `extend` into SGLang's backend, for all that it covers: no sliding windows, no cross-attention."""
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
        windowed = sliding_window_size is not None and sliding_window_size > -1
        pools = (query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens)
        if encoder_lens is not None or is_cross_attn or windowed:
            rest = (encoder_lens, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size)
            return theirs(self, *pools, extend_prefix_lens, extend_seq_lens, *rest)
        return extend(*pools, extend_seq_lens, scaling, enable_gqa, causal)

    TorchNativeAttnBackend._run_sdpa_forward_extend = run
