"""The GPU scripts as far as they go without a GPU: what they write, what they refuse, and how results are read."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "scripts" / "gpu", ROOT / "benchmark"):
    sys.path.insert(0, str(folder))

from gpurun import __main__ as runner  # noqa: E402
from gpurun.model import LLAMA_3_1_8B, llama_folder, widen  # noqa: E402
from gpurun.run import OutOfTimeError, Run, shared_kv_tokens  # noqa: E402
from gpurun.server import sums  # noqa: E402

import gpu_report  # noqa: E402
from gpu_results import Results, ResultsError, counted, figure, idle_share  # noqa: E402
from gpu_tables import report  # noqa: E402
from sglang_slo.core.latency import LatencyModel  # noqa: E402
from sglang_slo.twin.devices.profiles import DATA  # noqa: E402


def _run(tmp_path: Path, **fields: Any) -> Run:
    return Run("cpu", tmp_path / "out", tmp_path / "work", **fields)


def _replay(arm: str, level: str, attainment: float) -> dict[str, Any]:
    ttft = {"p50": 0.2, "p99": None}
    result = {
        "attainment": attainment,
        "goodput_rps": 1.0,
        "ttft_s": ttft,
        "tbt_s": {"p50": 0.02, "p99": 0.04},
    }
    return {"arm": arm, "level": level, "load": 1.0, "max_requests": 9, "result": result, "seconds": 4.0,
            "device_busy_s": 3.0, "counters": {"sglang_slo_preemptions_total": 2.0}}  # fmt: skip


def _results(folder: Path, device: str = "cuda", gpu: str = "a card") -> Results:
    environment = {"device": device, "gpu": gpu, "cores": 4, "versions": {"python": "3.12"}}
    (folder / "mix").mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"check": {"state": "done", "environment": environment}}))
    for arm, values in {"stock": (0.4, 0.5, 0.6), "ours": (0.9, 0.9, 0.8)}.items():
        for number, value in enumerate(values, 1):
            (folder / "mix" / f"{arm}-mid-{number}.json").write_text(json.dumps(_replay(arm, "mid", value)))
    return Results.read(folder)


def test_bundle_names_are_all_pinned_by_the_lock_file() -> None:
    def normal(name: str) -> str:
        return name.strip().lower().replace("_", "-").replace(".", "-")

    lines = (ROOT / "requirements-0.5.17.lock").read_text().splitlines()
    pinned = {normal(line.split("==")[0]) for line in lines if "==" in line}
    names = {
        normal(line.split("#")[0]) for line in (ROOT / "scripts/gpu/bundle.txt").read_text().splitlines()
    }
    assert names - {""} <= pinned


@pytest.mark.parametrize("script", ["pack.sh", "run.sh"])
def test_shell_scripts_parse(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts/gpu" / script)], check=False).returncode == 0


def test_pack_refuses_bad_input_before_fetching_anything(tmp_path: Path) -> None:
    for words in ([], ["--nonsense"], [str(tmp_path), "--data", str(tmp_path / "absent")]):
        done = subprocess.run(
            [str(ROOT / "scripts/gpu/pack.sh"), *words], capture_output=True, text=True, check=False
        )
        assert done.returncode and done.stderr.startswith("pack.sh: ")


@pytest.mark.parametrize(
    "words",
    [
        ["--rounds", "0", "a"],
        ["--arms", "stock,best", "a"],
        ["--loads", "1,2", "c"],
        ["--loads", "x", "c"],
        ["g"],
    ],
)
def test_runner_refuses_what_it_cannot_do(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.parse(["--out", "o", "--work", "w", *words])
    assert "accepted" in (said := capsys.readouterr().err) or "need" in said


def test_parts_come_in_the_order_they_build_on_each_other() -> None:
    assert runner.wanted(["f", "b", "mix-mid"]) == ["profile", "mix-mid", "twin"]
    assert runner.wanted(["all"]) == list(runner.part_names())


def test_every_id_of_the_model_has_text(tmp_path: Path) -> None:
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2}]}
    widen(tokenizer, 6)
    assert sorted(tokenizer["model"]["vocab"].values()) == [0, 1, 3, 4, 5]
    assert all(tokenizer["model"]["vocab"])


def test_llama_folder_is_read_as_the_shape_it_claims(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    from sglang_slo.cpu.demo_model import demo_model_path

    folder = llama_folder(tmp_path / "llama", demo_model_path(tmp_path))
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (4096, 32, 8)
    assert tokenizer.decode([LLAMA_3_1_8B["vocab_size"] - 1]).strip()
    assert tokenizer.encode("the word")


def test_kv_of_several_servers_fits_the_device() -> None:
    for count in (1, 2, 4):
        tokens = shared_kv_tokens(150e9, count)
        assert count * (tokens * 131072 + 16.1e9) < 150e9
    with pytest.raises(ValueError, match="do not fit"):
        shared_kv_tokens(24e9, 2)


def test_rounds_alternate_and_saved_ones_are_not_repeated(tmp_path: Path) -> None:
    run = _run(tmp_path, rounds=2)
    seen = []
    for arm, name in run.rounds_of("serve", run.arms):
        seen.append(name)
        run.save("serve", name, {"arm": arm})
    assert seen == ["stock-1", "ours-1", "ours-2", "stock-2"]
    assert run.finished("serve", run.arms) and not list(run.rounds_of("serve", run.arms))


def test_no_run_begins_that_cannot_end_in_time(tmp_path: Path) -> None:
    run = _run(tmp_path, deadline=time.monotonic() + 5, longest_s=60.0)
    with pytest.raises(OutOfTimeError, match="stock-1"):
        next(iter(run.rounds_of("serve", run.arms)))


def test_a_failing_part_is_noted_and_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpurun import parts

    def fails(run: Run) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(parts.PARTS, "serve", ("a", fails))
    args = runner.parse(
        ["--out", str(tmp_path), "--work", str(tmp_path), "--one", "--device", "cpu", "serve"]
    )
    assert runner.run_one(args, tmp_path, tmp_path) == 1
    entry = json.loads((tmp_path / "status.json").read_text())["serve"]
    assert entry["state"] == "failed" and "no such kernel" in entry["error"]


def test_counters_are_summed_over_labels_and_noise_is_passed_over() -> None:
    page = '# HELP a b\na_total{x="1"} 2\na_total{x="2"} 3.5\nb_total NaN?\n\n'
    assert sums(page) == {"a_total": 5.5}


def test_what_never_came_counts_as_endless_not_as_absent() -> None:
    run = _replay("ours", "mid", 1.0)
    assert figure("result", "ttft_s", "p99")(run) == float("inf")
    assert figure("result", "ttft_s", "p75")(run) is None
    assert idle_share(run) == 0.25 and idle_share({}) is None
    assert counted("sglang_slo_preemptions")(run) == 2.0 and counted("absent")(run) is None


def test_report_gives_medians_range_and_ratio_and_says_what_was_not_run(tmp_path: Path) -> None:
    text = report(_results(tmp_path))
    assert "attainment of ours over stock 1.80x" in text
    assert "0.500 [0.400, 0.600]" in text
    assert text.count("Not run.") == 5


def test_results_without_a_gpu_are_never_published(tmp_path: Path) -> None:
    for name, device, gpu in (("a", "cpu", "none"), ("b", "cuda", "")):
        with pytest.raises(ResultsError, match="only runs on a GPU"):
            gpu_report.require_gpu(_results(tmp_path / name, device, gpu))


def test_page_has_the_markers_that_results_go_between() -> None:
    page = gpu_report.PAGE.read_text()
    twice = gpu_report.folded(gpu_report.folded(page, "one"), "two")
    assert "\ntwo\n" in twice and "\none\n" not in twice
    assert (
        gpu_report.folded(twice, page.partition(gpu_report.BEGIN)[2].partition(gpu_report.END)[0].strip("\n"))
        == page
    )
    with pytest.raises(ResultsError):
        gpu_report.folded("no markers", "text")


def test_measured_profile_takes_the_place_of_the_modelled_one(tmp_path: Path) -> None:
    results, shelf = _results(tmp_path / "out"), tmp_path / "profiles"
    shelf.mkdir()
    modelled = LatencyModel.load(DATA / "profiles" / "h200-llama3-8b.json")
    modelled.save(shelf / "h200-llama3-8b.json")
    with pytest.raises(ResultsError, match="no profile was measured"):
        gpu_report.install_profile(results, shelf)
    source = results.folder / "profile" / "profile.json"
    source.parent.mkdir()
    modelled.scaled(2).save(source)
    with pytest.raises(ResultsError, match="not marked as measured"):
        gpu_report.install_profile(results, shelf)
    raw = json.loads(source.read_text())
    source.write_text(
        json.dumps({**raw, "measured": True, "name": "llama-3.1-8b-shape", "swap_bytes_per_s": 1.0})
    )
    installed = LatencyModel.load(gpu_report.install_profile(results, shelf))
    assert installed.measured and installed.name == "h200-llama3-8b"
    assert installed.coefficients == modelled.scaled(2).coefficients
    assert installed.swap_bytes_per_s == modelled.swap_bytes_per_s
    assert installed.meta["source"] == "measured on a card"
