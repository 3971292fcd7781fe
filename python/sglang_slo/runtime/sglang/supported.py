"""Which releases of SGLang are supported: those that all tests pass on.

Anything else is refused by name before it is imported: it would fail later, and less clearly, or schedule wrongly.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ("0.5.23", "0.5.17")  # the one that is installed by default first

# Flags that not all of them have.
FLAGS_OF_SOME = (
    "--prefill-decode-interval",
    "--enable-unified-cache-external-linker",
    "--enable-watermark",
    "--hicache-host-memory-mode",
)


class UnsupportedError(RuntimeError):
    """The installed SGLang is none of those that are supported."""


def check() -> None:
    """Raises UnsupportedError, saying which SGLang is here and which are accepted."""
    try:
        here = version("sglang")
    except PackageNotFoundError:
        here = "none"
    if here.split("+")[0] not in SUPPORTED:
        raise UnsupportedError(f"SGLang: accepted: {', '.join(SUPPORTED)}; installed: {here}")
