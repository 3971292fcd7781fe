"""What the `profile` command and the scheduler that measures for it agree upon: how it is asked, how it is told."""

from __future__ import annotations

from sglang_slo.core.latency import LatencyModel

MEASURE_ENV = "SGLANG_SLO_MEASURE"  # read by the scheduler process: {"out": file, "seconds": number}


def describe(model: LatencyModel) -> str:
    """The coefficients in the units that people think in, and how well they fit; some lines."""
    c = model.coefficients
    lines = [
        f"decode    {1e3 * (c.t0_decode + c.w):9.3f} ms, + {c.c_kv * 1e9:.2f} ns per token of context",
        f"prefill   {1e3 * c.t0_extend:9.3f} ms, + {c.c_tok * 1e6:.2f} us per token"
        f", + {c.c_attn * 1e9:.4f} ns per query-context pair",
        f"request   {1e3 * c.c_req:9.3f} ms each, in either",
        f"margin    {model.margin_extend:9.3f} x the prediction with prefill, {model.margin_decode:.3f} without",
    ]
    lines += [f"{name:14} {value}" for name, value in model.meta.get("fit", {}).items()]
    return "\n".join(lines)
