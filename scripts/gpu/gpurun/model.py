"""The model that is served: a real shape with random weights, and a tokenizer that needs no download.

On a GPU the shape is Llama-3.1-8B's, with `--load-format dummy`: speed depends on shapes, not on what the
weights say. On a CPU it is the package's demo model. The tokenizer is the demo model's byte-level one, with
a word of its own for every further id, so that each generated token has text and clients that count text
see every token.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

# The public shape of Llama-3.1-8B. Begin and end of text are ids of the tokenizer below, not the original's.
LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
KV_BYTES_PER_TOKEN = 2 * 32 * 8 * 128 * 2  # K and V, layers, KV heads, head size, bytes of bfloat16
WEIGHT_BYTES = 16.1e9  # 8.03e9 parameters of 2 bytes


def model_folder(device: str, work: Path) -> Path:
    """Folder of the model for `device`, made under `work` if it is not there."""
    from sglang_slo.cpu.demo_model import demo_model_path

    demo = demo_model_path(work / "models")
    return demo if device == "cpu" else llama_folder(work / "models" / "llama-3.1-8b-shape", demo)


def llama_folder(target: Path, tokenizer_from: Path) -> Path:
    """Config and tokenizer of the Llama-3.1-8B shape, without weights. Written whole or not at all."""
    if (target / "config.json").exists():
        return target
    building = target.with_name(target.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    tokenizer = json.loads((tokenizer_from / "tokenizer.json").read_text())
    widen(tokenizer, LLAMA_3_1_8B["vocab_size"])
    (building / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((tokenizer_from / "tokenizer_config.json").read_text())
    settings["model_max_length"] = LLAMA_3_1_8B["max_position_embeddings"]
    (building / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (building / "config.json").write_text(json.dumps(LLAMA_3_1_8B, indent=1))
    building.rename(target)
    return target


def widen(tokenizer: dict[str, Any], size: int) -> None:
    """Give every id below `size` a word in a byte-level BPE `tokenizer` (the content of its JSON file)."""
    vocabulary = tokenizer["model"]["vocab"]
    taken = set(vocabulary.values()) | {token["id"] for token in tokenizer.get("added_tokens", [])}
    # "Ġ" is a space in byte-level spelling. Words without merges are never produced from text, only decoded.
    vocabulary.update({f"Ġw{i}": i for i in range(size) if i not in taken})
