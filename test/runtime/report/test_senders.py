"""With several HTTP workers, whatever is sent about a request names the worker that waits for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import AbortReq, FlushCacheReqOutput
from sglang.srt.managers.scheduler_components import output_sender
from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels
from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper

from sglang_slo.runtime.report.senders import naming

WORKER = "ipc:///tmp/worker-1"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    out: list[Any] = []
    monkeypatch.setattr(output_sender, "sock_send", lambda socket, output: out.append(output))
    return out


def _channels() -> SchedulerIpcChannels:
    wire: Any = SenderWrapper(object())  # type: ignore[arg-type]
    return SchedulerIpcChannels(
        recv_from_tokenizer=None,
        recv_from_rpc=None,
        send_to_tokenizer=wire,
        send_to_detokenizer=wire,
        send_metrics_from_scheduler=None,
    )


def test_an_abort_of_a_request_names_its_worker(sent: list[Any]) -> None:
    req = SimpleNamespace(http_worker_ipc=WORKER)  # SGLang's `Req`, which is none of its messages
    _channels().send_to_tokenizer.send_output(AbortReq(rid="r"), req)
    naming(_channels()).send_to_tokenizer.send_output(AbortReq(rid="r"), req)
    assert sent[-1].http_worker_ipc == WORKER  # SGLang alone may leave it out


def test_a_name_that_is_there_stays_and_none_is_made_up(sent: list[Any]) -> None:
    sender = naming(_channels()).send_to_tokenizer
    sender.send_output(AbortReq(rid="r", http_worker_ipc="other"), SimpleNamespace(http_worker_ipc=WORKER))
    sender.send_output(AbortReq(rid="r"), SimpleNamespace(http_worker_ipc=None))
    sender.send_output(FlushCacheReqOutput(success=True))
    assert [m.http_worker_ipc for m in sent] == ["other", None, None]
    assert sender.socket is not None
