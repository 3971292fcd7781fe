"""The fake model worker: answers each batch at once and tells how long it would have taken.

It is SGLang's own `TpModelWorker` around a one-layer model of a few hundred kilobytes whose weights are
never used; pools, allocator and attention backend are SGLang's. A batch's tokens are constants, except that
a request's last token is the end-of-sequence token: true lengths are known here and nowhere else, and are
looked at only for the token that ends a request.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.managers.utils import GenerationBatchResult

from sglang_slo.twin.devices.device import Pass
from sglang_slo.twin.sim.tokens import EOS_ID, TOKEN, VOCAB

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    from sglang_slo.twin.sim.recorder import Recorder


def write_model(folder: Path, context_tokens: int, model: dict[str, Any] | None = None) -> Path:
    """Write the configuration of the placeholder model into `folder` and return it. `model`: what of it is another."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": context_tokens,
        "vocab_size": VOCAB,
        "eos_token_id": EOS_ID,
        "bos_token_id": 1,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **(model or {}),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class TwinWorker(TpModelWorker):
    """A worker whose passes take virtual time."""

    recorder: Recorder
    forward_blocks = False  # on the virtual device, as on a GPU

    def forward_batch_generation(self, batch: ScheduleBatch, *_: Any, **__: Any) -> GenerationBatchResult:
        """Launch the batch on the virtual engine; its result carries `end_s`."""
        return self.launch(batch, pass_of(batch))

    def launch(self, batch: ScheduleBatch, load: Pass) -> GenerationBatchResult:
        """Launch the batch as `load`, which gives each of its requests a token."""
        last = self.recorder.launched(batch, load, batch.seq_lens_cpu.tolist())
        tokens = torch.full((len(batch.reqs),), TOKEN, dtype=torch.int64)
        if last:
            tokens[list(last)] = EOS_ID
        result = GenerationBatchResult(logits_output=None, next_token_ids=tokens)
        if batch.return_logprob:
            result.logits_output = LogitsProcessorOutput(
                next_token_logits=None,
                next_token_logprobs=torch.zeros(len(batch.reqs)),
                input_token_logprobs=torch.zeros(0),
            )
            if batch.forward_mode.is_extend():
                result.extend_input_len_per_req = list(batch.extend_lens)
                result.extend_logprob_start_len_per_req = list(batch.extend_logprob_start_lens)
        result.end_s = self.recorder.engine.busy_until_s
        return result


def pass_of(batch: ScheduleBatch, drafts: int = 0) -> Pass:
    """What the device is given: the chunks of the batch's first requests, and its decodes, a token each."""
    lengths = batch.seq_lens_cpu.tolist()
    if not batch.forward_mode.is_extend():
        return Pass((), lengths)
    prefills = len(batch.reqs) - len(batch.decoding_reqs or ())
    new = batch.extend_lens[:prefills]
    chunks = tuple((length - n, n) for n, length in zip(new, lengths, strict=False))
    return Pass(chunks, lengths[prefills:], drafts=drafts)
