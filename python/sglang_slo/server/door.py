"""The door: where every request for the model passes, SGLang's `TokenizerManager.generate_request`.

Each endpoint, the offline Engine and gRPC meet there, so limits are read there and nowhere else. What a client wrote
into `custom_params["slo"]` is read as text and replaced by the trusted form; a limit that cannot be used raises
LimitError, which SGLang answers as it answers any unusable input, and ingress.py as a 400 that names the field. Stronger
beats weaker, field by field:

    1. `slo` in the body, or `custom_params.slo` (both only if they agree)
    2. `metadata.slo_*`, `custom_labels.slo_*`
    3. headers `x-slo-*`, `x-sgl-slo-*`, `x-llm-d-slo-*`
    4. `tracestate`, member `slo`
    5. `service_tier`, then an inference objective: a class
    6. the class that was named, else the server's default class, else its default numbers

A request without any limit passes as it came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_slo import clock
from sglang_slo.config import SloConfig
from sglang_slo.observe import counts
from sglang_slo.server.body import no_other_spelling
from sglang_slo.server.errors import FieldError, shown
from sglang_slo.server.inputs import parallel
from sglang_slo.server.limits import NOTHING, Limited, LimitError, Limits, WireSlo, parse, resolve, to_wire
from sglang_slo.server.visit import VISIT, Visit

PARAMS_SLO = "custom_params.slo"
HEALTH_CHECK = "HEALTH_CHECK"  # SGLang's own probes begin with it
# What SGLang warms up with, over HTTP: of several tokenizer workers another one may get it, which is up already.
WARM_UP, WARM_UP_PROMPTS = (
    {"temperature": 0, "max_new_tokens": 8},
    ("The capital city of France is", [10, 11, 12]),
)


class Door:
    """The hook around `generate_request` of a server with `config`."""

    def __init__(self, config: SloConfig) -> None:
        self.config = config
        self._default = resolve(NOTHING, config)

    def hook(self, generate: Callable[..., Any], manager: Any, obj: Any, request: Any = None) -> Any:
        """SGLang's generator of answers for `obj`, whose limits are read first. Raises LimitError."""
        visit = VISIT.get()
        if isinstance(
            obj.input_ids, Mapping
        ):  # Ollama's chat with transformers 5, whose templates return more than ids
            obj.input_ids = list(obj.input_ids["input_ids"])
        try:
            parallel(obj)
            own = _sglangs_own(manager, obj)
            limited = self.admit(obj, visit, own)
        except FieldError as error:
            if visit is not None:
                visit.reached, visit.refused = True, error
            raise
        if not own:
            counts.note(visit.path if visit is not None else "offline", limited)
        return generate(manager, obj, request)

    def admit(self, obj: Any, visit: Visit | None, own: bool = False) -> bool:
        """Write the limits of `obj` into its sampling parameters. Returns whether it has any. Raises LimitError.

        `own`: SGLang's own probe, which need not have a limit.
        """
        received_s = clock.now()
        if visit is not None:
            visit.reached, received_s = True, visit.arrived_s()
        rows = list(self._rows(obj, visit))
        asked = [limits for _, limits in rows]
        if visit is not None:
            visit.tell = any(limits.given.get("verdict") for limits in asked)
        slos = [resolve(limits, self.config) if limits.given else self._default for limits in asked]
        for slo, limits in zip(slos, asked, strict=True):
            if self.config.require and not own and slo.best_effort and "class" not in limits.given:
                raise LimitError("slo", "this server takes no request without a limit; see its `slo` field")
        said = any(limits.given for limits in asked) or not self._default.best_effort
        if said and isinstance(obj, GenerateReqInput):  # embeddings have no deadline: theirs are only checked
            params = [
                _with_slo(row, to_wire(slo, received_s)) for (row, _), slo in zip(rows, slos, strict=True)
            ]
            several = isinstance(obj.sampling_params, list) or _batch_size(obj) is not None
            obj.sampling_params = params if several else params[0]
        return not all(slo.best_effort for slo in slos)

    def _rows(self, obj: Any, visit: Visit | None) -> Iterator[tuple[Any, Limits]]:
        """The sampling parameters of each item of the batch (or of the one request), and what it asked for."""
        own = visit.said.own if visit is not None else None
        beside = visit.beside if visit is not None else NOTHING
        params, size = obj.sampling_params, _batch_size(obj)
        if isinstance(own, list) and (size is None or len(own) != size):
            wanted = "one object" if size is None else f"one object, or a list of {size} for this batch"
            raise LimitError("slo", f"need {wanted}; got a list of {len(own)}")
        if isinstance(params, list) and len(params) != (size or 1):
            raise FieldError(
                "sampling_params", f"need one object, or a list of {size or 1}; got {len(params)}"
            )
        for i in range(size or 1):
            row = params[i] if isinstance(params, list) else params
            own_row = own[i] if isinstance(own, list) else own
            own_name = f"slo[{i}]" if isinstance(own, list) else "slo"
            inner_name = f"sampling_params[{i}]" if isinstance(params, list) else "sampling_params"
            inner, inner_name = _inside(row, inner_name), f"{inner_name}.{PARAMS_SLO}"
            if inner is None and visit is not None and visit.said.params is not None:
                inner, inner_name = visit.said.params, PARAMS_SLO
            yield row, _one(own_row, inner, own_name, inner_name).over(beside)


def _one(own: Any, inner: Any, own_name: str, inner_name: str) -> Limits:
    # The body has two places for limits; both may be used only if they say the same.
    a, b = parse(own, own_name), parse(inner, inner_name)
    if own is not None and inner is not None and a.given != b.given:
        raise LimitError(f"{own_name} and {inner_name}", "at odds; give one, or the same in both")
    return a if a.given else b


def _inside(params: Any, params_name: str) -> Any:
    if params is None:
        return None
    if not isinstance(params, Mapping):
        raise LimitError(params_name, f"need an object, got {shown(params)}")
    custom, where = params.get("custom_params"), f"{params_name}.custom_params"
    if custom is None:
        return None
    if not isinstance(custom, Mapping):
        raise LimitError(where, f"need an object, got {shown(custom)}")
    no_other_spelling(custom, f"{where}.")
    said = custom.get("slo")
    return None if isinstance(said, WireSlo) else said  # from an earlier pass: SGLang's tool calls come again


def _with_slo(params: Any, wire: WireSlo) -> Limited:
    custom = {**((params or {}).get("custom_params") or {}), "slo": wire}
    return Limited({**(params or {}), "custom_params": custom}, before=params or {})


def _batch_size(obj: Any) -> int | None:
    # As SGLang decides it: a list of prompts, or a list of lists of token ids. None: a single request.
    text, ids, embeds = (getattr(obj, name, None) for name in ("text", "input_ids", "input_embeds"))
    if text is not None:
        return len(text) if isinstance(text, list) else None
    if ids is not None:
        return len(ids) if isinstance(ids, list) and ids and isinstance(ids[0], list) else None
    if isinstance(embeds, list) and embeds and isinstance(embeds[0], list) and embeds[0]:
        return len(embeds) if isinstance(embeds[0][0], list) else None
    return None


def _sglangs_own(manager: Any, obj: Any) -> bool:
    # Health probes, and the warm-up that SGLang sends to itself before it says that it is up.
    if getattr(getattr(manager, "server_status", None), "name", "") == "Starting":
        return True
    rid, prompt = getattr(obj, "rid", None), obj.text if obj.text is not None else obj.input_ids
    if isinstance(rid, str) and rid.startswith(HEALTH_CHECK):
        return True
    first = prompt[0] if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else prompt
    return obj.sampling_params == WARM_UP and first in WARM_UP_PROMPTS
