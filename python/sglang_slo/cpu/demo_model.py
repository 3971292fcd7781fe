"""The embedded demo model: a tiny random Llama with a byte-level tokenizer, so that a server starts anywhere.

Built once, in a second or two, in a cache folder; its words mean nothing. Same seed, same bytes: every
build of the same VERSION gives the same weights. The folder appears whole or not at all (built beside it
and renamed).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

VERSION = 2  # part of the folder's name: raise it with any change below
VOCAB = 512
CONTEXT_TOKENS = 16384
_WORDS = ("the", "and", "ing", "ion", "ent", "for", "tha", "ter", "ers", "are", "was", "all", "not", "you")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def cache_dir() -> Path:
    """Folder for what is made once and kept: `$SGLANG_SLO_CACHE_DIR`, or sglang-slo in the user's cache."""
    override = os.environ.get("SGLANG_SLO_CACHE_DIR")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-slo"


def demo_model_path(root: Path | None = None) -> Path:
    """Folder of the demo model, built now if it is not there yet."""
    target = (root or cache_dir()) / f"demo-model-v{VERSION}"
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".demo-model-", dir=target.parent))
    try:
        _write_tokenizer(building)
        _write_weights(building)
        _make_readable(building)
        building.rename(target)
    except OSError:
        if not (target / "config.json").exists():  # else: another process was first, and its copy is the same
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _make_readable(folder: Path) -> None:
    # mkdtemp and safetensors write for the owner alone; a cache may be shared.
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def _write_weights(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        model = LlamaForCausalLM(config)
    # Sharper than the usual initial weights: near-ties between logits would make greedy output depend on the
    # batch a request happened to run in. A generator of its own: other threads may draw from torch's.
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.save_pretrained(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    fill = VOCAB - tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"<|unused{i}|>", normalized=False) for i in range(fill)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "model_max_length": CONTEXT_TOKENS,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _corpus() -> list[str]:
    # Every pair of common letter groups: enough for the trainer to find all the merges it may keep.
    return [f"{a}{b} {b} {a}" for a in _WORDS for b in _WORDS]
