"""Length models on disk: one file each, replaced atomically, refused unless whole.

A file is a magic line, a JSON header (versions, training span, checksum of what follows) and an npz of arrays. The
folder holds at most the current model, the one before, one being written, and one snapshot of finished requests.
Reading never runs code from the file (no pickle) and never hands unchecked bytes to the tree library.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xgboost as xgb
from numpy.typing import NDArray

from sglang_slo.core.lengths import QUANTILES
from sglang_slo.estimator import features
from sglang_slo.estimator.head import TextHead
from sglang_slo.estimator.model import COLUMNS, LengthModel
from sglang_slo.estimator.typical import Typical

MAGIC = b"SLO-LENGTHS 1\n"
CURRENT, PREVIOUS, CANDIDATE, SNAPSHOT = (
    "lengths.slo",
    "lengths.previous.slo",
    "lengths.new.slo",
    "finished.npy",
)


class StoreError(ValueError):
    """A model file that cannot be used; the message says which and why."""


@dataclass
class Saved:
    """A model with what is known about it: held-out raw log quantiles `raw` [m, Q] and log lengths `logs` [m] that its
    calibration starts from, and `about` (training span, losses)."""

    model: LengthModel
    raw: NDArray[np.floating]
    logs: NDArray[np.floating]
    about: dict[str, Any] = field(default_factory=dict)


def save(path: Path, saved: Saved) -> None:
    """Write atomically: a reader sees the old file or the new one. Raises OSError (disk full, no permission)."""
    buffer = io.BytesIO()
    booster = np.frombuffer(bytes(saved.model.booster.save_raw("ubj")), np.uint8)
    arrays = {"booster": booster, "raw": saved.raw, "logs": saved.logs, **saved.model.head.arrays()}
    arrays |= {f"typical_{name}": getattr(saved.model.typical, name) for name in _TYPICAL}
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    payload = buffer.getvalue()
    header = {
        "features": features.VERSION,
        "columns": len(COLUMNS),
        "quantiles": QUANTILES.tolist(),
        "rows": saved.model.rows,
        "rounds": saved.model.rounds,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "about": saved.about,
    }
    write_atomically(path, MAGIC + json.dumps(header).encode() + b"\n", payload)


def load(path: Path) -> Saved:
    """Read a model. Raises StoreError for anything missing, truncated, corrupt or of another version."""
    header, payload = _read(path)
    try:
        with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        booster = xgb.Booster({"nthread": 1})
        booster.load_model(bytearray(arrays["booster"].tobytes()))
        typical = Typical(*(arrays[f"typical_{name}"] for name in _TYPICAL))
        model = LengthModel(booster, TextHead.from_arrays(arrays), typical, header["rows"], header["rounds"])
        return Saved(model, arrays["raw"], arrays["logs"], header["about"])
    except (KeyError, ValueError, TypeError, OSError, zipfile.BadZipFile, xgb.core.XGBoostError) as error:
        raise StoreError(f"{path}: damaged: {error}") from error


def header_of(path: Path) -> dict[str, Any]:
    """The checked header alone. Raises StoreError as `load`."""
    return _read(path)[0]


def promote(folder: Path) -> None:
    """Make the candidate the current model and keep the current one as the one before. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        (folder / CURRENT).replace(folder / PREVIOUS)
    (folder / CANDIDATE).replace(folder / CURRENT)


def write_atomically(path: Path, *parts: bytes | NDArray[np.generic]) -> None:
    """Write beside, flush to disk, rename over. Leaves nothing behind if it fails. Raises OSError."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as out:
            for part in parts:
                if isinstance(part, bytes):
                    out.write(part)
                else:
                    out.flush()
                    part.tofile(out)  # without a copy, and other threads run on meanwhile
            out.flush()
            os.fsync(out.fileno())
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def sweep(folder: Path) -> None:
    """Remove half-written files that a crash left behind. Raises nothing."""
    with contextlib.suppress(OSError):
        for leftover in folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)


_TYPICAL = ("group_names", "group_values", "class_names", "class_values")


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not data.startswith(MAGIC):
        raise StoreError(f"{path}: not a length model of this version")
    line, _, payload = data[len(MAGIC) :].partition(b"\n")
    try:
        header = json.loads(line)
        checksum, version, columns = header["sha256"], header["features"], header["columns"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: damaged header") from error
    if hashlib.sha256(payload).hexdigest() != checksum:
        raise StoreError(f"{path}: checksum differs, the file is truncated or damaged")
    if (
        version != features.VERSION
        or columns != len(COLUMNS)
        or header.get("quantiles") != QUANTILES.tolist()
    ):
        raise StoreError(f"{path}: made for features version {version}, this is {features.VERSION}")
    return header, payload
