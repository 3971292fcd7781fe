"""Reports trouble once a minute, however often it happens: never silent, never a flood."""

from __future__ import annotations

import logging

EVERY_S = 60.0


class Throttle:
    """Counts occurrences; logs the first at once and then at most one in `every_s` seconds."""

    def __init__(self, logger: logging.Logger, every_s: float = EVERY_S) -> None:
        self._logger, self._every_s = logger, every_s
        self._next_s: float | None = None
        self._quiet = 0  # occurrences since the last line
        self.count = 0

    def happened(self, message: str, now_s: float, error: BaseException | None = None) -> None:
        """Count one; `message` is logged as an error if a line is due, with the traceback of `error`."""
        self.count += 1
        self._quiet += 1
        if self._next_s is not None and now_s < self._next_s:
            return
        trace = None if error is None else (type(error), error, error.__traceback__)
        self._logger.error("%s (%d times since the last such line)", message, self._quiet, exc_info=trace)
        self._quiet, self._next_s = 0, now_s + self._every_s
