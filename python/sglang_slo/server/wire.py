"""From the door to the scheduler: how trusted limits travel, and that nothing leaves which the scheduler cannot read.

SGLang sends requests as msgpack by the types of its structs. There a `WireSlo` would become a plain map, which a client
can write as well, so it travels beside the request: pickled, in a field that only SGLang's own process fills
(`mm_data_mooncake`, whose content is kept), and is put back where the scheduler unwraps that field, on every rank. With
SGLANG_USE_PICKLE_IPC it stays where it is.

A value of another type than the struct says (`skip_special_tokens: 5`, a nested `custom_params`) would end the scheduler,
which reads messages without a guard: `check` reads each request as the scheduler will, before it is sent.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from sglang.srt.managers import io_struct

from sglang_slo.server.errors import FieldError
from sglang_slo.server.limits import WireSlo

# Not from a client as they stand at the time of the check, or a flat array of integers already.
_UNCHECKED = {"input_ids": None, "mm_inputs": None, "mm_data_mooncake": None, "time_stats": None}


@dataclass(frozen=True)
class Carried:
    """What travels in `mm_data_mooncake`: the limits and what was there."""

    wire: WireSlo
    beside: Any


def wrap(original: Callable[[Any], None], request: Any) -> None:
    """SGLang's `wrap_pickle_fields` of a tokenized request, with the limits packed."""
    if not io_struct._USE_PICKLE_IPC:
        bare, wire = _apart(request.sampling_params)
        if wire is not None:
            request.sampling_params = bare
            original(request)
            carried = Carried(wire, request.mm_data_mooncake)
            request.mm_data_mooncake = io_struct.PickleWrapper(pickle.dumps(carried))
            return
    original(request)


def unwrap(original: Callable[[Any], None], request: Any) -> None:
    """SGLang's `unwrap_pickle_fields` of a tokenized request, with the limits back in place."""
    original(request)
    carried = request.mm_data_mooncake
    if not isinstance(carried, Carried):
        return
    request.mm_data_mooncake = io_struct.unwrap_from_pickle(carried.beside)
    params = copy.copy(request.sampling_params)
    params.custom_params = {**(params.custom_params or {}), "slo": carried.wire}
    request.sampling_params = params


def check(request: Any) -> None:
    """Raises FieldError if the scheduler could not read this tokenized request."""
    bare, _ = _apart(request.sampling_params)
    kind = type(request)
    fields = {name: value for name, value in _UNCHECKED.items() if name in kind.__struct_fields__}
    sample = msgspec.structs.replace(request, sampling_params=bare, **fields)
    try:
        data = msgspec.msgpack.encode(sample, enc_hook=io_struct.enc_hook)
        msgspec.msgpack.decode(data, type=kind, dec_hook=io_struct.dec_hook)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise FieldError(*_named(kind, bare, str(error))) from error


def _apart(params: Any) -> tuple[Any, WireSlo | None]:
    custom = params.custom_params
    wire = custom.get("slo") if isinstance(custom, dict) else None
    if not isinstance(wire, WireSlo):
        return params, None
    bare = copy.copy(params)
    bare.custom_params = {key: value for key, value in custom.items() if key != "slo"} or None
    return bare, wire


def _named(kind: Any, params: Any, text: str) -> tuple[str, str]:
    """The field that a msgspec error speaks of, by its place in the array (the first is the type), and the problem."""
    problem = text.split(" - at ")[0][:200]
    places = [int(place) for place in re.findall(r"\[(\d+)\]", text.partition(" - at ")[2])]
    if not places or places[0] - 1 >= len(kind.__struct_fields__):
        return "request", problem
    field = kind.__struct_fields__[places[0] - 1]
    if field == "sampling_params" and len(places) > 1 and places[1] < len(type(params).__struct_fields__):
        return f"{field}.{type(params).__struct_fields__[places[1]]}", problem
    return field, problem
