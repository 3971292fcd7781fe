"""The demo model: whole or not there, the same every time, and good for chat and grammars."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from sglang_slo.cpu import demo_model
from sglang_slo.cpu.demo_model import demo_model_path


def digest(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def test_two_builds_are_the_same_bytes_even_at_once(tmp_path: Path) -> None:
    one = demo_model_path(tmp_path / "a")
    builders = [threading.Thread(target=demo_model_path, args=(tmp_path / "b",)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    two = demo_model_path(tmp_path / "b")
    assert digest(one) == digest(two)
    assert [p.name for p in (tmp_path / "b").iterdir()] == [two.name]  # nothing half-built is left


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(demo_model, "_write_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        demo_model_path(tmp_path)
    assert not list(tmp_path.iterdir())


def test_any_text_survives_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path(tmp_path))
    assert len(tokenizer) == demo_model.VOCAB
    text = 'the {"a": [1]}\n\tZürich 東京 \U0001f600'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "hi" in chat
