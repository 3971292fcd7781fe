"""A model file is whole or refused; writing one leaves the old or the new, never a half."""

from __future__ import annotations

import json

import pytest
from synthetic import prompts

from sglang_slo.estimator import store
from sglang_slo.estimator.features import encode
from sglang_slo.estimator.store import Saved, StoreError
from sglang_slo.estimator.training import offline


@pytest.fixture(scope="module")
def saved() -> Saved:
    requests, lengths = prompts(250)
    return offline(encode(requests), lengths, seed=0)


@pytest.fixture
def path(saved, tmp_path):
    store.save(tmp_path / store.CURRENT, saved)
    return tmp_path / store.CURRENT


def test_a_model_says_the_same_after_its_file(saved, path):
    rows = encode(prompts(40, seed=3)[0])
    loaded = store.load(path)
    assert loaded.model.predict(rows).tobytes() == saved.model.predict(rows).tobytes()
    assert loaded.logs.tolist() == saved.logs.tolist()
    assert loaded.about == saved.about


@pytest.mark.parametrize("keep", [0, 5, 40, 400, 0.5, 0.999])
def test_a_truncated_file_is_refused(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(StoreError, match=path.name):
        store.load(path)


@pytest.mark.parametrize("place", [3, 30, 0.3, 0.9])
def test_a_flipped_byte_is_noticed(path, place):
    data = bytearray(path.read_bytes())
    at = place if isinstance(place, int) else int(len(data) * place)
    data[at] ^= 0x15
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError):
        store.load(path)


def test_another_version_of_the_features_is_refused(path):
    magic, header, payload = path.read_bytes().split(b"\n", 2)
    changed = {**json.loads(header), "features": 999}
    path.write_bytes(magic + b"\n" + json.dumps(changed).encode() + b"\n" + payload)
    with pytest.raises(StoreError, match="version 999"):
        store.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(StoreError, match="cannot be read"):
        store.load(tmp_path / "nothing")


def test_a_full_disk_leaves_the_old_file_and_no_litter(saved, path, monkeypatch):
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        store.save(path, saved)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [store.CURRENT]


def test_promotion_keeps_the_model_before(saved, path):
    first = path.read_bytes()
    store.save(path.parent / store.CANDIDATE, saved)
    store.promote(path.parent)
    assert (path.parent / store.PREVIOUS).read_bytes() == first
    assert not (path.parent / store.CANDIDATE).exists()


def test_leftovers_of_a_crash_are_swept(tmp_path):
    (tmp_path / "lengths.slo.123.tmp").write_bytes(b"half")
    store.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
