"""Deadlines in SGLang's frontend language.

`RuntimeEndpoint(url, slo={...})` gives every request of a program these limits, `endpoint.with_slo({...})`
gives one run others, and `gen(..., slo={...})` one call. Limits are what the `slo` field of a request
accepts: an object with `ttft_ms`, `tbt_ms` (ms) and `class`. The narrower wins: call over run over
endpoint.

    backend = RuntimeEndpoint("http://localhost:30000", slo={"class": "chat"})
    state = program.run("a question", backend=backend.with_slo({"ttft_ms": 2000}))
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint as StockEndpoint

from sglang_slo.server.limits import parse

Limits = Mapping[str, Any]


@dataclass(frozen=True)
class _Limited:
    """A call's `dtype` with its limits."""

    dtype: Any
    slo: Limits


class RuntimeEndpoint(StockEndpoint):
    """SGLang's RuntimeEndpoint whose requests carry `slo` (None: no limits). Raises LimitError."""

    def __init__(self, base_url: str, *args: Any, slo: Limits | None = None, **kwargs: Any) -> None:
        parse(slo)
        self.slo = slo
        super().__init__(base_url, *args, **kwargs)

    def with_slo(self, slo: Limits | None) -> RuntimeEndpoint:
        """The same endpoint with other limits; this one stays as it is. Raises LimitError."""
        parse(slo)
        other = copy.copy(self)
        other.slo = slo
        return other

    def generate(self, s: Any, sampling_params: Any) -> Any:
        """One call of `gen`; returns (text, meta_info)."""
        return self._for_call(sampling_params)._generate(s, sampling_params)

    def generate_stream(self, s: Any, sampling_params: Any) -> Any:
        """One call of `gen` in a streaming run; yields (text, meta_info)."""
        return self._for_call(sampling_params)._generate_stream(s, sampling_params)

    def _generate(self, s: Any, sampling_params: Any) -> Any:
        return super().generate(s, sampling_params)

    def _generate_stream(self, s: Any, sampling_params: Any) -> Any:
        return super().generate_stream(s, sampling_params)

    def _for_call(self, sampling_params: Any) -> RuntimeEndpoint:
        limited = sampling_params.dtype
        if not isinstance(limited, _Limited):
            return self
        sampling_params.dtype = limited.dtype
        return self.with_slo(limited.slo)

    def _add_images(self, s: Any, data: dict[str, Any]) -> None:
        # The one place that the body of each request passes: gen, select, fork and images alike.
        super()._add_images(s, data)
        if self.slo is not None:
            data["slo"] = dict(self.slo)


def gen(name: str | None = None, *args: Any, slo: Limits | None = None, **kwargs: Any) -> Any:
    """`sgl.gen` with limits of its own for this call. Raises LimitError; ValueError with `choices`."""
    expression = sgl.gen(name, *args, **kwargs)
    if slo is None:
        return expression
    parse(slo)
    if not hasattr(expression, "sampling_params"):
        raise ValueError("slo: not accepted together with choices; run with backend.with_slo(...) instead")
    # SGLang's interpreter passes on only the parameters it knows. `dtype` is one that it never sends.
    expression.sampling_params.dtype = _Limited(expression.sampling_params.dtype, slo)
    return expression
