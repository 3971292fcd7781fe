"""The only source of time in the package.

Everything that needs the time calls `now()`. The twin replaces the clock by a virtual one (`use`), so that the
same scheduler code runs in real and in virtual time. Times are seconds on an arbitrary, monotone scale.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_source: Callable[[], float] = time.monotonic


def now() -> float:
    """Seconds on a monotone clock; differences are meaningful, the origin is not."""
    return _source()


def use(source: Callable[[], float] | None) -> None:
    """Replace the source of time for this process; None restores the machine's own monotone clock."""
    global _source
    _source = source or time.monotonic
