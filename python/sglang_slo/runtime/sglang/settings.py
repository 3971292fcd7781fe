"""SGLang's settings as SGLang has resolved them: what was asked for, with all that it decided itself.

Newer releases leave the record of what was asked for as it is and keep their decisions beside it; older ones write them
into the record.
"""

from __future__ import annotations

import inspect
from typing import Any


def resolved(server_args: Any) -> Any:
    """The settings to go by; `server_args` itself where SGLang decides in place."""
    if not hasattr(server_args, "resolve_once"):
        return server_args
    from sglang.srt.arg_groups.model_override_base import resolved_view

    server_args.resolve_once()
    return resolved_view(server_args)


def bound_ranks(server_args: Any) -> int:
    """On a CPU, how many ranks SGLang binds to cores of their own.

    Newer releases: all; older ones those of a replica, each replica to the same cores.
    """
    from sglang.srt.utils import numa_utils

    settings = resolved(server_args)
    of_all = "world_size" in inspect.signature(numa_utils.init_threads_binding).parameters
    return int(settings.tp_size * (settings.dp_size * settings.pp_size if of_all else 1))


def attention_backends(server_args: Any) -> tuple[str, str]:
    """The resolved attention backends for prefill and for decode."""
    if hasattr(server_args, "get_attention_backends"):
        return server_args.get_attention_backends()
    settings = resolved(server_args)
    prefill, decode = settings.prefill_attention_backend, settings.decode_attention_backend
    return prefill or settings.attention_backend, decode or settings.attention_backend


def attention_of_model(server_args: Any) -> tuple[Any, bool, str]:
    """SGLang's configuration of the model, whether it has latent attention, and the default backend for it."""
    if hasattr(server_args, "get_model_config"):
        model, latent = server_args.get_model_config(), server_args.use_mla_backend()
        return model, latent, server_args._get_default_attn_backend(latent, model)
    from sglang.srt.arg_groups import model_override_base as of

    model, latent = of.model_config_of(server_args), of.use_mla_backend(server_args)
    return model, latent, of.get_default_attn_backend(server_args, latent, model)
