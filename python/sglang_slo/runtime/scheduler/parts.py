"""The parts of one scheduler, built in order and given to each other. Knows everybody, decides nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sglang_slo import clock
from sglang_slo.core.plan import Planner
from sglang_slo.core.steps import DecodeStep
from sglang_slo.observe.observer import Observer
from sglang_slo.runtime.kv.held import HeldPrefills
from sglang_slo.runtime.kv.host_pool import HostLink, measured_link
from sglang_slo.runtime.kv.look_up import PrefixLookUp
from sglang_slo.runtime.kv.preempt import Preemptor
from sglang_slo.runtime.kv.prefix_pins import Pins
from sglang_slo.runtime.kv.prefixes import PrefixGroups
from sglang_slo.runtime.latency.online_fit import OnlineFit
from sglang_slo.runtime.ports import Agreed, Iteration, KvPool, Ports, Ranks, Tick, Trouble
from sglang_slo.runtime.report.gauges import GaugeReader
from sglang_slo.runtime.report.request_times import Reporter, metric_labels
from sglang_slo.runtime.requests.registry import RequestRegistry
from sglang_slo.runtime.scheduler.applier import Applier
from sglang_slo.runtime.scheduler.engine import EngineBatches, EngineQueue
from sglang_slo.runtime.scheduler.lifecycle import Lifecycle
from sglang_slo.runtime.scheduler.news import News
from sglang_slo.runtime.scheduler.planning import Planning
from sglang_slo.runtime.scheduler.viewer import Viewer
from sglang_slo.runtime.sglang import pools, speculation
from sglang_slo.runtime.sglang.settings import resolved

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_slo.config import SloConfig
    from sglang_slo.core.latency import LatencyModel
    from sglang_slo.runtime.requests.lengths import ArrivingLengths

logger = logging.getLogger(__name__)

MOST_PINNED_SHARE = 0.25  # of the pool may be kept for requests that wait


@dataclass(frozen=True)
class Parts:
    """What `SloScheduler` is made of, beside SGLang."""

    ports: Ports
    observer: Observer
    reporter: Reporter | None
    lengths: ArrivingLengths | None
    fit: OnlineFit
    planner: Planner
    preempt: Preemptor
    pins: Pins
    viewer: Viewer
    lifecycle: Lifecycle
    news: News
    planning: Planning
    held: HeldPrefills
    gauges: GaugeReader


def ports_of(scheduler: Scheduler, config: SloConfig, model: LatencyModel, trouble: Trouble) -> Ports:
    """The doors of one scheduler."""
    s = scheduler
    slots, page_tokens = s.token_to_kv_pool_allocator, int(s.token_to_kv_pool_allocator.page_size)
    kv = KvPool(
        s.tree_cache,
        slots,
        s.req_to_token_pool,
        int(s.max_total_num_tokens),
        page_tokens,
        window=pools.window_of(s),
    )
    return Ports(
        kv=kv,
        waiting=EngineQueue(s),
        requests=RequestRegistry(config, page_tokens, DecodeStep(*speculation.step(s))),
        settings=config,
        batches=EngineBatches(s, kv),
        agreed=Agreed(Tick(clock.now(), confidence=config.confidence_high), model),
        iteration=Iteration(s.running_batch),
        trouble=trouble,
        tell=lambda answer, req: s.ipc_channels.send_to_tokenizer.send_output(answer, req),
        ranks=Ranks(s.slo_ranks.tp_size, s.tp_cpu_group),
    )


def _link(scheduler: Scheduler) -> HostLink | None:
    """What loads from a hierarchical cache cost; the profile's word is taken for it where there is none to be measured."""
    virtual = scheduler.device == "cpu" and not scheduler.slo_forward_blocks
    if not scheduler.enable_hierarchical_cache or virtual:
        return None
    return measured_link(scheduler.token_to_kv_pool_allocator.get_kvcache())


def settled(scheduler: Scheduler, config: SloConfig) -> SloConfig:
    """The settings as far as this scheduler can go by them; what it cannot is left out, and said."""
    if config.mix != "never" and not speculation.mixes(scheduler):
        logger.info("sglang-slo: prefill and speculative decodes take turns: SGLang cannot mix them here")
        config = replace(config, mix="never")
    if config.host_kv_gb > 0 and speculation.on(scheduler):
        logger.warning("sglang-slo: --slo-host-kv-gb: left out: the draft model's KV would stay behind")
        config = replace(config, host_kv_gb=0.0)
    if config.host_kv_gb > 0 and (scheduler.is_hybrid_swa or scheduler.is_hybrid_ssm):
        logger.warning(
            "sglang-slo: --slo-host-kv-gb has no effect: a copy would have the KV of one pool alone"
        )
        config = replace(config, host_kv_gb=0.0)
    return config


def build(scheduler: Scheduler, config: SloConfig, model: LatencyModel, overlap: bool) -> Parts:
    """Everything, around the latency model that the server starts with."""
    s, rank0 = scheduler, scheduler.slo_ranks.attn_tp_rank == 0
    config = settled(s, config)
    dp_rank = s.slo_ranks.dp_rank if resolved(s.server_args).dp_size > 1 else None
    observer = Observer(config, rank0, metric_labels(s), dp_rank)
    reporter = Reporter(observer, config.request_log_text) if rank0 else None
    ports = ports_of(s, config, model, Trouble(observer))
    table, capacity = ports.requests.table, ports.kv.capacity_tokens
    look_up, groups = PrefixLookUp(ports.kv, table), PrefixGroups(ports.kv.page_tokens)
    pins = Pins(s.tree_cache, table, int(MOST_PINNED_SHARE * capacity), look_up.look_up)
    held = HeldPrefills(ports.kv, table, ports.waiting)
    link, lora = _link(s), bool(s.enable_lora)
    pool = s.make_host_pool() if config.host_kv_gb > 0 else None
    preempt = Preemptor(ports, pool, look_up, pins, held, lora, link)
    lengths = s.make_lengths() if rank0 else None
    lifecycle = Lifecycle(ports, look_up, groups, pins, held, reporter, lengths)
    viewer = Viewer(ports, preempt, pins, look_up, lifecycle.open, lifecycle.open_begun)
    lifecycle.viewer = viewer
    fit, planner = OnlineFit(model, overlap, log=rank0), Planner(config)
    applier = Applier(ports, look_up, held, preempt.queue_again, lifecycle.refused)
    return Parts(
        ports=ports,
        observer=observer,
        reporter=reporter,
        lengths=lengths,
        fit=fit,
        planner=planner,
        preempt=preempt,
        pins=pins,
        viewer=viewer,
        lifecycle=lifecycle,
        news=News(ports, fit, preempt, lambda: s.slo_lengths),
        planning=Planning(
            ports, planner, viewer, preempt, applier, pins, groups, look_up, held, s.slo_fell_back
        ),
        held=held,
        gauges=GaugeReader(ports, preempt, viewer, fit.metrics, lengths, observer.lately),
    )
