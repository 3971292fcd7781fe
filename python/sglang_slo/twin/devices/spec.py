"""Which measured device: a model on a system, how many GPUs share it, and how it is quantized.

Written `MODEL,SYSTEM[,tp=2][,quant=fp8_block][,kv=fp8][,version=0.5.16]` on a command line, as a mapping of the
same names in a workload's YAML (`device: {model, system, tp, quant, kv, version}`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ACCEPTED = "MODEL,SYSTEM[,tp=2][,quant=fp8_block][,kv=fp8][,version=0.5.16]"
_FIELDS = ("model", "system", "tp", "quant", "kv", "version")


class DeviceError(ValueError):
    """A device that is not known, or cannot be made here; the message names the field."""


@dataclass(frozen=True)
class DeviceSpec:
    """Names of the database's own, except that `model` may leave out the organisation. None: as the model comes."""

    model: str
    system: str
    tp: int = 1
    quant: str | None = None  # of the matrix multiplications: fp8, fp8_block, ...
    kv: str | None = None  # of the KV cache
    version: str | None = None  # SGLang's; None: the newest that was measured in full

    def __str__(self) -> str:
        parts = [self.model, self.system, f"tp={self.tp}"]
        parts += [f"{n}={getattr(self, n)}" for n in ("quant", "kv", "version") if getattr(self, n)]
        return ",".join(parts)

    @staticmethod
    def parse(text: str) -> DeviceSpec:
        """From a command line. Raises DeviceError naming the field."""
        words = [word.strip() for word in text.split(",")]
        raw: dict[str, Any] = dict(zip(("model", "system"), words[:2], strict=False))
        for word in words[2:]:
            name, equals, value = word.partition("=")
            if not equals or name not in _FIELDS[2:] or name in raw:
                raise DeviceError(f"--device: need {ACCEPTED}, got {word!r} in {text!r}")
            raw[name] = int(value) if name == "tp" and value.isdecimal() else value
        return DeviceSpec.of(raw, "--device")

    @staticmethod
    def of(raw: Any, where: str) -> DeviceSpec:
        """From a mapping. Raises DeviceError naming `where` and the field."""
        if not isinstance(raw, dict):
            raise DeviceError(f"{where}: need a mapping of {', '.join(_FIELDS)}, got {raw!r}")
        for name in raw:
            if name not in _FIELDS:
                raise DeviceError(f"{where}: {name}: unknown; known: {', '.join(_FIELDS)}")
        for name in ("model", "system"):
            if not isinstance(raw.get(name), str) or not raw[name]:
                raise DeviceError(f"{where}: {name}: needed, as text ({ACCEPTED}); got {raw.get(name)!r}")
        tp = raw.get("tp", 1)
        if isinstance(tp, bool) or not isinstance(tp, int) or not 1 <= tp <= 64:
            raise DeviceError(f"{where}: tp: need a whole number from 1 to 64, got {tp!r}")
        for name in ("quant", "kv", "version"):
            if not isinstance(raw.get(name), str | None):
                raise DeviceError(f"{where}: {name}: need text, got {raw[name]!r}")
        return DeviceSpec(**{**raw, "tp": tp})
