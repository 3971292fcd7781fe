"""A field that cannot be used: its error, and how what a client wrote is shown in one.

Values and names come from clients: they may be huge, hold lone surrogates or line breaks. In a message they are
short, on one line, and can be encoded.
"""

from __future__ import annotations

import reprlib
from typing import Any

SHOWN = 80  # characters of a value or a name that a message repeats


class FieldError(ValueError):
    """`field`: what cannot be used, as the client wrote it; the message names it and what is accepted."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        problem = str(self)[len(self.field) + 2 :]
        return type(self), (self.field, problem)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = SHOWN
        self.maxdict = self.maxlist = self.maxtuple = 4

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write integers of thousands of digits
        return super().repr_int(x, level) if abs(x) < 10**SHOWN else "an integer of more than 80 digits"


_short = _Short()


def shown(value: Any) -> str:
    """A value as a message repeats it."""
    try:
        text = _short.repr(value)
    except Exception:  # whatever a foreign `__repr__` does
        text = f"a {type(value).__name__}"
    return _plain(text)


def name(key: Any) -> str:
    """A key of an object as part of a field's name."""
    if isinstance(key, str) and len(key) <= SHOWN and key.isascii() and key.isprintable():
        return key
    return shown(key)


def _plain(text: str) -> str:
    text = text.encode(
        "ascii", "backslashreplace"
    ).decode()  # then cut: an escape is longer than what it stands for
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
