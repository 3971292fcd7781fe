"""A real scheduler with the demo model on this CPU, in this process, fed by a script instead of sockets.

Everything computes for real: KV, swap copies and tokens are what a server would have. A script sees the scheduler
before each iteration and may send it requests and commands; the run is over when all requests have ended.
"""

from __future__ import annotations

import argparse
import gc
import os
import warnings
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import sglang_slo.twin.platform as plain_cpu

plain_cpu.settle()

import torch  # noqa: E402
from sglang.srt.distributed import parallel_state  # noqa: E402
from sglang.srt.managers import scheduler as stock  # noqa: E402
from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput  # noqa: E402
from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels  # noqa: E402
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer  # noqa: E402
from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver  # noqa: E402
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402

from sglang_slo import settings_in  # noqa: E402
from sglang_slo.cpu.demo_model import demo_model_path  # noqa: E402
from sglang_slo.runtime.latency.startup_profile import GUESS  # noqa: E402
from sglang_slo.runtime.scheduler.scheduler import SloScheduler  # noqa: E402
from sglang_slo.runtime.sglang import process  # noqa: E402

# The imports are no garbage: SGLang collects whenever it builds a scheduler, and would walk them for most of that time.
gc.collect()
gc.freeze()

Script = Callable[[Any, int], list[Any]]  # (scheduler, iteration) -> what it receives now
MOST_ITERATIONS = 20_000
MOST_EACH = 200  # and so many a request


@dataclass
class Run:
    """What came out. `tokens`: output of each request that finished; `aborted`: ids of those that did not."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    reqs: dict[str, Any] = field(default_factory=dict)  # SGLang's own objects of those that finished
    scheduler: Any = None

    @property
    def counts(self) -> dict[str, int]:
        """Preemptions by way out."""
        return dict(self.scheduler.slo_preempt.counts)


def request(
    rid: str, prompt: list[int], output: int, wants: dict[str, Any] | None = None, **params: Any
) -> TokenizedGenerateReqInput:
    """A request for exactly `output` greedy tokens. `wants`: fields of the request, `params`: of its sampling."""
    least = params.pop("min_new_tokens", 0)
    sampling = SamplingParams(**{"max_new_tokens": output, "temperature": 0.0, "ignore_eos": True, **params})
    sampling.normalize(None)
    sampling.min_new_tokens = least  # SGLang checks it against a tokenizer, which there is none of here
    fields: dict[str, Any] = {
        "input_text": None,
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": None,
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "token_ids_logprob": None,
        "stream": True,
        "time_stats": APIServerReqTimeStats(),
    }
    return TokenizedGenerateReqInput(
        rid=rid, input_ids=array("q", prompt), sampling_params=sampling, **{**fields, **(wants or {})}
    )


class _Ends:
    """In the place of all sockets."""

    def __init__(self, run: Run, script: Script, expected: int) -> None:
        self.run, self.script, self.expected = run, script, expected
        self.iteration = 0

    def pull(self) -> list[Any]:
        if (
            len(self.run.tokens) + len(self.run.aborted) == self.expected
            and self.run.scheduler.is_fully_idle()
        ):
            self.run.scheduler.on_idle()  # SGLang's own check for leaks
            self.run.scheduler.gracefully_exit = True
            return []
        self.iteration += 1
        assert self.iteration < MOST_ITERATIONS + MOST_EACH * self.expected, "the scheduler hangs"
        return self.script(self.run.scheduler, self.iteration)

    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        if isinstance(output, AbortReq) and output.rid and output.rid not in self.run.aborted:
            self.run.aborted.append(output.rid)

    def tokens_out(self, reqs: list[Any]) -> None:
        for req in reqs:
            known = req.rid in self.run.tokens or req.rid in self.run.aborted
            if req.finished_reason is None or known:
                continue
            if req.finished_reason.to_json()["type"] == "abort":
                self.run.aborted.append(req.rid)
            else:
                self.run.tokens[req.rid] = list(req.output_ids)
                self.run.reqs[req.rid] = req


def run(
    script: Script, expected: int, argv: list[str], folder: Path, slo: bool = True, tokenizer: Any = None
) -> Run:
    """Run until `expected` requests have ended. `argv`: SGLang's flags and ours."""
    result = Run()
    ends = _Ends(result, script, expected)

    def channels(self: Any, port_args: Any) -> None:
        self.recv_from_tokenizer, self.load_snapshot_writer = ends, None
        self.ipc_channels = SchedulerIpcChannels(
            recv_from_tokenizer=ends,
            recv_from_rpc=None,
            send_to_tokenizer=ends,
            send_to_detokenizer=ends,
            send_metrics_from_scheduler=None,
        )

    base: type = SloScheduler if slo else stock.Scheduler
    cls = type("Scripted" + base.__name__, (base,), {"init_ipc_channels": channels})
    with _environment(argv, folder) as args:
        result.scheduler = process.build(cls, args)
        if tokenizer is not None:
            result.scheduler.tokenizer = tokenizer
        with torch.inference_mode():
            result.scheduler.run_event_loop()
    return result


class _environment:  # noqa: N801 - reads as a function
    def __init__(self, argv: list[str], folder: Path) -> None:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        settings_in.add_flags(parser)
        ours, self._stock = parser.parse_known_args(argv)
        self._slo, self._folder = settings_in.from_args(ours), folder

    def __enter__(self) -> ServerArgs:
        self._before = dict(os.environ)
        profile = self._folder / "profile.json"
        GUESS.save(profile)  # measuring takes seconds
        replace(self._slo, profile=str(profile)).to_env()
        os.environ["SGLANG_SLO_CACHE_DIR"] = str(self._folder)
        self._patches = [
            mock.patch.object(
                SchedulerRequestReceiver, "_pull_raw_reqs", lambda r: r.recv_from_tokenizer.pull()
            ),
            mock.patch.object(SchedulerOutputStreamer, "_stream_output_generation", _sent),
            mock.patch.object(stock, "create_scheduler_watchdog", lambda *_, **__: None),
        ]
        for patch in self._patches:
            patch.start()
        parser = argparse.ArgumentParser(allow_abbrev=False)
        ServerArgs.add_cli_args(parser)
        fixed = {
            "--model-path": str(demo_model_path(self._folder)),
            "--device": "cpu",
            "--attention-backend": "torch_native",
            "--grammar-backend": "none",
            "--dtype": "float32",  # a rounding error must not decide between two tokens
            "--random-seed": "1",
            "--log-level": "error",
        }
        words = [word for pair in fixed.items() for word in pair]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = ServerArgs.from_cli_args(
                parser.parse_args([*words, "--skip-tokenizer-init", *self._stock])
            )
        process.publish(args)
        torch.set_num_threads(1)
        return args

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()
        os.environ.clear()
        os.environ.update(self._before)
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


def _sent(self: Any, reqs: list[Any], *_: Any, **__: Any) -> None:
    self.send_to_detokenizer.tokens_out(reqs)


def all_at_once(requests: list[Any]) -> Script:
    """A script that sends everything at the start."""
    return lambda scheduler, iteration: requests if iteration == 1 else []


def prompts(count: int, length: int) -> Iterator[list[int]]:
    """Prompts that share no token at their start."""
    generator = torch.Generator().manual_seed(11)
    for i in range(count):
        body = torch.randint(10, 500, (length + 3 * i,), generator=generator).tolist()
        yield [10 + i, *body]
