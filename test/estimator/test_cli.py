"""The command line reads both kinds of file, reports the stated keys, and names what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from synthetic import prompt

from sglang_slo.estimator import evaluate
from sglang_slo.estimator.__main__ import main
from sglang_slo.estimator.data import read


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "answers.jsonl"
    rows = []
    for _ in range(120):
        text, log = prompt(rng)
        chars = {m: int(4 * np.exp(log + shift)) for m, shift in (("small", -0.5), ("large", 0.3))}
        rows.append(json.dumps({"instruction": text, "output_chars": chars}))
    path.write_text("\n".join(rows))
    return path


def test_eval_reports_the_stated_keys_and_beats_the_constant(answers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sglang_slo.estimator.model.MAX_ROUNDS", 20)
    monkeypatch.setattr(evaluate, "INNER_FOLDS", 2)
    plot = tmp_path / "calibration.png"
    assert main(["eval", "--data", str(answers), "--json", "--folds", "2", "--plot", str(plot)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["mae_tokens"] < 0.6 * figures["mae_tokens_constant"]
    assert figures["pinball_90"] < figures["pinball_90_constant"]
    for key in ("coverage", "reserved_tokens"):
        assert set(figures[key]) == {"conformal", "hoeffding"}
        assert set(figures[key]["conformal"]) == {"0.5", "0.8", "0.9", "0.95"}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_no_prompt_is_on_both_sides_of_a_fold(answers):
    data = read(answers)
    assert len(data.rows) == 240 and data.prompt.max() == 119
    folds = evaluate._folds(120, 5, 0)[data.prompt]
    assert all(len(set(folds[data.prompt == p])) == 1 for p in range(120))


def test_train_then_show(answers, tmp_path, capsys):
    assert main(["train", "--data", str(answers), "--out", str(tmp_path), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert main(["show", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["rows"] == trained["rows"] and shown["top_features"]


def test_a_request_log_is_read(tmp_path):
    path = tmp_path / "log.jsonl"
    row = {
        "class": "chat",
        "prompt_tokens": 12,
        "output_tokens": 34,
        "features": {"declared_max": 99, "model": "m"},
    }
    path.write_text(json.dumps(row) + "\n\n" + json.dumps({"text": "hello", "output_tokens": 5}))
    data = read(path)
    assert data.lengths_tokens.tolist() == [34, 5] and data.models.tolist() == ["m", ""]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "data.jsonl:2: not JSON"),
        ("[1]", "data.jsonl:2: need a JSON object"),
        ('{"output_chars": {"m": 3}}', "data.jsonl:2: instruction: need text"),
        ('{"instruction": "a", "output_chars": {"m": -3}}', "output_chars.m: need a number of at least 0"),
        ('{"instruction": "a", "output_chars": 7}', "output_chars: need a mapping"),
        ('{"output_tokens": "many"}', "output_tokens: need a number"),
        ('{"input_tokens": 3}', "need output_chars or output_tokens"),
    ],
)
def test_a_bad_row_is_named_by_line_and_field(tmp_path, capsys, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "hello", "output_tokens": 5}\n' + line)
    assert main(["eval", "--data", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", '{"text": "hello", "output_tokens": 5}'])
def test_a_missing_empty_or_short_file_is_an_error(tmp_path, capsys, content):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content)
    assert main(["eval", "--data", str(path)]) == 2
    assert "error:" in capsys.readouterr().err


def test_the_training_child_needs_neither_torch_nor_sglang():
    code = "import sys, sglang_slo.estimator.training; print([m for m in ('torch', 'sglang') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
