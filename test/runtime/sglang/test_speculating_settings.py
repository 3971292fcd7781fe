"""What of our settings a speculating scheduler can go by: the rest is left out, and said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("sglang.srt.speculative.spec_info")
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_slo.config import SloConfig
from sglang_slo.core.steps import PLAIN, DecodeStep
from sglang_slo.runtime.latency.startup_profile import GUESS, startup_model
from sglang_slo.runtime.scheduler.parts import settled
from sglang_slo.runtime.sglang import speculation

ASKED = SloConfig(mix="auto", host_kv_gb=8.0)


def scheduler(algorithm: SpeculativeAlgorithm) -> SimpleNamespace:
    return SimpleNamespace(spec_algorithm=algorithm, is_hybrid_swa=False, is_hybrid_ssm=False)


def test_without_speculation_a_decode_gives_one_token_and_every_setting_holds() -> None:
    plain = scheduler(SpeculativeAlgorithm.NONE)
    assert DecodeStep(*speculation.step(plain)) == PLAIN
    assert settled(plain, ASKED) == ASKED


@pytest.mark.parametrize("name", ["EAGLE", "EAGLE3", "STANDALONE", "NGRAM"])
def test_no_kv_goes_to_the_host_and_only_what_sglang_can_mix_is_mixed(name: str) -> None:
    there = settled(scheduler(SpeculativeAlgorithm[name]), ASKED)
    mixes = speculation.TELLS_OF_MIXING and name in ("EAGLE", "EAGLE3")
    assert there == SloConfig(mix="auto" if mixes else "never")


def test_a_plain_decode_of_a_speculating_servers_model_is_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its graphs are those of verifying."""
    from sglang_slo.runtime.latency import startup_profile

    monkeypatch.setattr(startup_profile, "key", lambda scheduler: {})
    monkeypatch.setattr(startup_profile, "stored", lambda mine: None)
    monkeypatch.setattr(startup_profile, "measure", lambda *_: pytest.fail("measured"))
    ranks = SimpleNamespace(tp_size=1, tp_rank=0)
    speculating = SimpleNamespace(
        spec_algorithm=SpeculativeAlgorithm.EAGLE, slo_config=SloConfig(), slo_ranks=ranks
    )
    assert startup_model(speculating) is GUESS
