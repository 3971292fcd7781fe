"""The attention of the plain CPU gives what SGLang's own gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sglang_slo.cpu import attention


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 8), (True, 100)])
def test_it_equals_sglangs_for_whole_prompts_cut_ones_and_decodes(causal: bool, window: int | None) -> None:
    if window and not hasattr(TorchNativeAttnBackend, "_make_sliding_window_mask"):
        pytest.skip("this release has none")
    generator = torch.Generator().manual_seed(3)
    heads, kv_heads, size, pool = 4, 2, 16, 200
    totals, news = torch.tensor([20, 50, 33, 7]), torch.tensor([20, 12, 1, 6])
    k, v = (torch.randn(pool, kv_heads, size, generator=generator) for _ in range(2))
    rows = torch.stack([torch.randperm(pool, generator=generator)[:60] for _ in range(4)])
    query = torch.randn(int(news.sum()), heads, size, generator=generator)
    order = torch.tensor([2, 0, 3, 1])
    given = (k, v, rows, order, totals)
    ours = attention.extend(query, torch.zeros_like(query), *given, news, 0.25, True, causal, window)
    theirs = torch.zeros_like(query)
    how = {"scaling": 0.25, "enable_gqa": True, "causal": causal, "sliding_window_size": window}
    backend = SimpleNamespace(_make_sliding_window_mask=TorchNativeAttnBackend._make_sliding_window_mask)
    TorchNativeAttnBackend._run_sdpa_forward_extend(
        backend, query, theirs, *given, totals - news, news, **how
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
