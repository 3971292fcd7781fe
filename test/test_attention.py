"""The attention backend: SGLang's own choice for the model and the device, on devices that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_slo.attention import attention_line

pytestmark = pytest.mark.alone

HOPPER, BLACKWELL, AMPERE = "9.0", "10.0", "8.0"
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}
SLIDING = {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]}
MLA = {
    **COMMON,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
LINEAR = {
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
SEES = {
    "model_type": "llama4_vision_model",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def _nested(kind: str, text: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model_type": kind, "text_config": {"model_type": f"{kind}_text", **COMMON, **text}, **more}


MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama", **COMMON, "num_hidden_layers": 2},
    "GptOssForCausalLM": {
        "model_type": "gpt_oss",
        **COMMON,
        **SLIDING,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Llama4ForConditionalGeneration": _nested(
        "llama4",
        {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 1024,
        },
        vision_config=SEES,
    ),
    "Gemma4ForConditionalGeneration": _nested("gemma4", {"num_hidden_layers": 2, **SLIDING}),
    "DeepseekV3ForCausalLM": {"model_type": "deepseek_v3", **MLA},
    "DeepseekV32ForCausalLM": {
        "model_type": "deepseek_v32",
        **MLA,
        "index_topk": 2048,
        "index_head_dim": 128,
        "index_n_heads": 4,
    },
    "Qwen3NextForCausalLM": {
        "model_type": "qwen3_next",
        **COMMON,
        **LINEAR,
        **EXPERTS,
        "num_hidden_layers": 4,
        "num_experts": 4,
    },
}


def _on(capability: str, folder: Path) -> dict[str, dict[str, Any]]:
    for name, fields in MODELS.items():
        (folder / name).mkdir()
        config = {"architectures": [name], "torch_dtype": "bfloat16", **fields}
        (folder / name / "config.json").write_text(json.dumps(config))
    command = [sys.executable, str(Path(__file__).with_name("fake_cuda.py")), capability]
    done = subprocess.run(
        [*command, *(str(folder / name) for name in MODELS)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(MODELS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("capability", [HOPPER, BLACKWELL, AMPERE])
def test_every_model_starts_with_the_backend_that_stock_picks(capability: str, tmp_path: Path) -> None:
    told = _on(capability, tmp_path)
    errors = {name: answer["error"] for name, answer in told.items() if "error" in answer}
    assert not errors
    for answer in told.values():
        assert answer["backends"] == answer["stock"]
        assert (
            answer["backends"][0] in answer["line"] and f"page size {answer['page_size']}" in answer["line"]
        )
    if capability == AMPERE:  # nothing to prefer: FlashInfer, except where it cannot serve the model
        assert set(told["LlamaForCausalLM"]["backends"]) == {"flashinfer"}
        assert "SGLang's default here" in told["LlamaForCausalLM"]["line"]
        assert "attention sinks" in told["GptOssForCausalLM"]["line"]
    else:
        assert "SGLang prefers it to FlashInfer for MHA models" in told["LlamaForCausalLM"]["line"]
    assert "requires it for DeepseekV32ForCausalLM" in told["DeepseekV32ForCausalLM"]["line"]


class _Args(SimpleNamespace):
    device, page_size = "cuda", 1

    def get_attention_backends(self) -> tuple[str, str]:
        return "fa3", "flashinfer"

    def get_model_config(self) -> Any:
        raise OSError("no such model")


def test_a_backend_that_was_named_is_told_as_asked_for() -> None:
    line = attention_line(_Args(), {"--decode-attention-backend"})
    assert line == "attention backend fa3 for prefill, flashinfer for decode: as asked for; page size 1"


def test_a_reason_that_cannot_be_told_stops_no_server() -> None:
    assert "no such model" in attention_line(_Args(), set())
