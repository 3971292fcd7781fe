"""Which attention backend serves, and why: SGLang's own choice for the model and the device, put into words.

FlashInfer is SGLang's own default on the devices where SGLang has nothing better, and on them it stays ours.
Elsewhere SGLang has reasons (a kernel that the model cannot do without, a faster one on this device), it tests
what it chooses, and a forced backend can keep a model from starting: so nothing is forced here.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from sglang_slo.runtime.sglang.settings import attention_backends, attention_of_model, resolved

FLAGS = frozenset({"--attention-backend", "--prefill-attention-backend", "--decode-attention-backend"})


def attention_line(server_args: Any, given: Set[str]) -> str:
    """One line for the log: backend, reason, page size. `given`: the names of the flags the user gave."""
    settings = resolved(server_args)
    prefill, decode = attention_backends(server_args)
    backends = prefill if prefill == decode else f"{prefill} for prefill, {decode} for decode"
    try:
        why = _why(server_args, given, prefill, decode)
    except Exception as error:  # a line in a log is worth no server
        why = f"SGLang's choice (its reason could not be told: {error!r})"
    return f"attention backend {backends}: {why}; page size {settings.page_size}"


def _why(server_args: Any, given: Set[str], prefill: str, decode: str) -> str:
    if given & FLAGS:
        return "as asked for"
    device = resolved(server_args).device
    if device != "cuda":
        return f"SGLang's default on {device}"
    model, uses_mla, default = attention_of_model(server_args)
    name = " ".join(model.hf_config.architectures or ["this model"])
    if {prefill, decode} != {default}:
        return f"SGLang requires it for {name} or for the flags given (it would else be {default})"
    if default == "flashinfer":
        return "SGLang's default here"
    sinks = "; FlashInfer has no attention sinks" if model.has_attention_sinks else ""
    return f"SGLang prefers it to FlashInfer for {'MLA' if uses_mla else 'MHA'} models on this device{sinks}"
