"""What is kept of finished requests is bounded, recent, and remembers a little of the past."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_slo.estimator.features import ROW, ArrivalFeatures, encode
from sglang_slo.estimator.reservoir import Reservoir, load_snapshot, save_snapshot

ANY_ROW = np.zeros(1, ROW).tobytes()


def _filled(n: int, seed: int = 0) -> Reservoir:
    reservoir = Reservoir(capacity=60, recent=40, seed=seed)
    for i in range(n):
        reservoir.add(ANY_ROW, i)
    return reservoir


def test_the_newest_are_all_kept():
    kept = _filled(1000).content()["output_tokens"]
    assert set(range(960, 1000)) <= set(kept.astype(int).tolist())


def test_the_past_is_sampled_evenly():
    old = np.concatenate([_filled(2000, seed).content()["output_tokens"][:20] for seed in range(40)])
    assert (old < 1960).all()
    assert abs((old < 980).mean() - 0.5) < 0.08


@pytest.mark.parametrize("n", [0, 1, 39, 40, 41, 59, 60, 61, 500])
def test_content_is_in_order_without_repeats_and_as_long_as_it_says(n):
    reservoir = _filled(n)
    orders = reservoir.content()["order"].tolist()
    assert orders == sorted(set(orders))
    assert len(orders) == len(reservoir) == min(n, 60)


def test_memory_does_not_grow_with_a_fast_stream():
    reservoir = _filled(100)
    size = reservoir._rows.nbytes
    for i in range(20_000):
        reservoir.add(ANY_ROW, i)
    assert reservoir._rows.nbytes == size
    assert len(reservoir) == 60


def test_a_snapshot_brings_everything_back(tmp_path):
    reservoir = _filled(100)
    reservoir.add(encode([ArrivalFeatures(9, text="hello")]).tobytes(), 77)
    save_snapshot(tmp_path / "s", reservoir.content())
    again = Reservoir(capacity=60, recent=40)
    again.restore(load_snapshot(tmp_path / "s"))
    assert again.content()["row"].tobytes() == reservoir.content()["row"].tobytes()
    assert again.content()["output_tokens"].tolist() == reservoir.content()["output_tokens"].tolist()


@pytest.mark.parametrize("cut", [0, 3, 1000])
def test_a_damaged_snapshot_is_refused(tmp_path, cut):
    save_snapshot(tmp_path / "s", _filled(10).content())
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:cut])
    with pytest.raises(ValueError):
        load_snapshot(tmp_path / "s")
