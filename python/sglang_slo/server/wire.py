"""From the door to the scheduler: how trusted limits travel, and that nothing leaves which ends who reads it.

SGLang pickles requests by default, and a `WireSlo` stays one. With SGLANG_USE_PICKLE_IPC=0 it sends them as msgpack by
the types of its structs: there a `WireSlo` would become a plain map, which a client can write as well. Then it travels
beside the request: pickled, in a field that only SGLang's own process fills (`time_stats`, whose content is
kept), and is put back where the scheduler unwraps that field, on every rank.

Parameters of another type than SGLang's struct says (`skip_special_tokens: 9223372036854775807`, or a list of
`top_logprobs_num` with a single prompt) end whoever works with them first, detokenizer or scheduler. `check` reads a request
as they will.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
from sglang.srt.managers import io_struct

from sglang_slo.server.errors import FieldError, shown
from sglang_slo.server.limits import WireSlo

# Not from a client as they stand at the time of the check, or a flat array of integers already.
_UNCHECKED = {"input_ids": None, "mm_inputs": None, "mm_data_mooncake": None, "time_stats": None}
_UNCHECKED = {
    k: v for k, v in _UNCHECKED.items() if k in io_struct.TokenizedGenerateReqInput.__struct_fields__
}


@dataclass(frozen=True)
class Carried:
    """What travels in `time_stats`: the limits and what was there."""

    wire: WireSlo
    beside: Any


def wrap(original: Callable[[Any], None], request: Any) -> None:
    """SGLang's `wrap_pickle_fields` of a tokenized request, with the limits packed."""
    if not io_struct._USE_PICKLE_IPC:
        bare, wire = _apart(request.sampling_params)
        if wire is not None:
            request.sampling_params = bare
            original(request)
            carried = Carried(wire, request.time_stats)
            request.time_stats = io_struct.PickleWrapper(pickle.dumps(carried))
            return
    original(request)


def unwrap(original: Callable[[Any], None], request: Any) -> None:
    """SGLang's `unwrap_pickle_fields` of a tokenized request, with the limits back in place."""
    original(request)
    carried = request.time_stats
    if not isinstance(carried, Carried):
        return
    request.time_stats = io_struct.unwrap_from_pickle(carried.beside)
    params = copy.copy(request.sampling_params)
    params.custom_params = {**(params.custom_params or {}), "slo": carried.wire}
    request.sampling_params = params


def check(request: Any) -> None:
    """Raises FieldError if the types of this tokenized request are not SGLang's."""
    bare, _ = _apart(request.sampling_params)
    try:
        if (
            io_struct._USE_PICKLE_IPC
        ):  # what is no type of theirs may well be what a logit processor works with
            loose = copy.copy(bare)
            loose.custom_params = loose.logit_bias = None
            msgspec.msgpack.decode(msgspec.msgpack.encode(loose), type=type(loose), strict=False)
        else:
            kind = type(request)
            fields = {name: value for name, value in _UNCHECKED.items() if name in kind.__struct_fields__}
            sample = msgspec.structs.replace(request, sampling_params=bare, **fields)
            data = msgspec.msgpack.encode(sample, enc_hook=io_struct.enc_hook)
            msgspec.msgpack.decode(data, type=kind, dec_hook=io_struct.dec_hook)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise FieldError(*_named(request, bare, str(error))) from error
    if io_struct._USE_PICKLE_IPC:
        check_plain(type(request), request)


def check_plain(struct: Any, request: Any) -> None:
    """Raises FieldError for a field that a client wrote, and that has another type than SGLang's `struct` says.

    Pickled, nothing else would look at them. A value of a class of SGLang's own is not a client's.
    """
    for name, kind in _field_types(struct):
        value = getattr(request, name)
        if isinstance(value, bool | int | float | str | list | dict):
            try:
                msgspec.convert(value, kind)
            except msgspec.ValidationError as error:
                raise FieldError(name, f"{str(error)[:200]}: {shown(value)}") from error


@lru_cache(maxsize=8)
def _field_types(struct: type[msgspec.Struct]) -> list[tuple[str, Any]]:
    skip = {*_UNCHECKED, "sampling_params"}
    return [(field.name, field.type) for field in msgspec.structs.fields(struct) if field.name not in skip]


def _apart(params: Any) -> tuple[Any, WireSlo | None]:
    custom = params.custom_params
    wire = custom.get("slo") if isinstance(custom, dict) else None
    if not isinstance(wire, WireSlo):
        return params, None
    bare = copy.copy(params)
    bare.custom_params = {key: value for key, value in custom.items() if key != "slo"} or None
    return bare, wire


def _named(request: Any, params: Any, text: str) -> tuple[str, str]:
    """The field that a msgspec error speaks of, by its place in the array, and the problem."""
    problem, _, path = text.partition(" - at ")
    places = [int(place) for place in re.findall(r"\[(\d+)\]", path)]
    if not io_struct._USE_PICKLE_IPC and places:
        field = _field(request, places.pop(0) - 1)  # the first element is the type
        if field != "sampling_params":
            return field, problem[:200]
    name = _field(params, places[0]) if places else ""
    return f"sampling_params.{name}" if name else "sampling_params", problem[:200]


def _field(struct: Any, place: int) -> str:
    names = type(struct).__struct_fields__
    return names[place] if 0 <= place < len(names) else "request"
