"""How a scheduler and its worker are built in this process, and what the scheduler's place among the ranks is.

Newer releases publish a process's place once and read it from there; older ones hand it from object to object.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglang.srt import runtime_context
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.utils.network import get_free_port

PUBLISHED = hasattr(runtime_context, "SpawnRanks")  # a process's place is published with its settings


def publish(server_args: ServerArgs) -> None:
    """Settings of this process: the only rank of a scheduler of its own."""
    place = {"ranks": runtime_context.SpawnRanks(world_rank=0, gpu_id=0)} if PUBLISHED else {}
    runtime_context.publish(server_args, role="scheduler", **place)


def build(scheduler_class: type, server_args: ServerArgs) -> Any:
    """A scheduler of `scheduler_class` as this process's only rank; `publish` comes first."""
    # Newer releases draw the port from `random`, which a scheduler seeds: processes side by side would draw the same.
    ports = replace(PortArgs.init_new(server_args), nccl_port=get_free_port())
    place = () if PUBLISHED else (0, 0, 0, 0, 0, 0, None)
    return scheduler_class(server_args, ports, *place)


def ranks(scheduler: Any) -> Any:
    """`tp_rank`, `tp_size`, `attn_tp_rank`, `dp_rank` and the like of this scheduler's process."""
    return runtime_context.get_parallel() if PUBLISHED else scheduler.ps


def worker_arguments(scheduler: Any) -> dict[str, Any]:
    """What a model worker of this scheduler is made with."""
    made = {"server_args": scheduler.server_args, "nccl_port": scheduler.nccl_port}
    if PUBLISHED:
        return {**made, "gpu_id": runtime_context.get_device().gpu_id}
    return {**made, "gpu_id": scheduler.ps.gpu_id, "ps": scheduler.ps}


def weights_loader(worker_class: type) -> type:
    """The class whose `update_weights_from_disk` gives a worker of `worker_class` other weights."""
    if hasattr(worker_class, "update_weights_from_disk"):
        return worker_class
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    return WeightUpdater
