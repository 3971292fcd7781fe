"""Names the waiting HTTP worker on what the scheduler sends back about a request.

With several HTTP workers an answer without a name reaches nobody, and its client waits for ever. SGLang fills the name
in where it answers a message, but not where it answers for a request of its own (`Req`): its refusals of a full queue
and of a long wait, its aborts, and ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglang.srt.managers.io_struct import BaseReq
from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels


class NamingSender:
    """One of SGLang's senders; whatever it is told about is named after the worker that waits for it."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        """SGLang's, with the name filled in."""
        worker = getattr(recv_obj, "http_worker_ipc", None)
        if worker is not None and isinstance(output, BaseReq) and output.http_worker_ipc is None:
            output.http_worker_ipc = worker
        self._sender.send_output(output, recv_obj)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sender, name)


def naming(channels: SchedulerIpcChannels) -> SchedulerIpcChannels:
    """The same channels; what goes to the HTTP side carries its worker's name."""
    return replace(channels, send_to_tokenizer=NamingSender(channels.send_to_tokenizer))
