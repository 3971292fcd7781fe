"""The parts of one scheduler, built in order and given to each other. Knows everybody, decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_slo import clock
from sglang_slo.core.plan import Planner
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
from sglang_slo.runtime.requests.registry import RequestBook
from sglang_slo.runtime.scheduler.applier import Applier
from sglang_slo.runtime.scheduler.engine import EngineBatches, EngineQueue
from sglang_slo.runtime.scheduler.lifecycle import Lifecycle
from sglang_slo.runtime.scheduler.news import News
from sglang_slo.runtime.scheduler.planning import Planning
from sglang_slo.runtime.scheduler.viewer import Viewer
from sglang_slo.runtime.sglang import pools
from sglang_slo.runtime.sglang.settings import resolved

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_slo.config import SloConfig
    from sglang_slo.core.latency import LatencyModel
    from sglang_slo.runtime.requests.lengths import ArrivingLengths

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
        requests=RequestBook(config, page_tokens),
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


def build(scheduler: Scheduler, config: SloConfig, model: LatencyModel, overlap: bool) -> Parts:
    """Everything, around the latency model that the server starts with."""
    s, rank0 = scheduler, scheduler.slo_ranks.attn_tp_rank == 0
    dp_rank = s.slo_ranks.dp_rank if resolved(s.server_args).dp_size > 1 else None
    observer = Observer(config, rank0, metric_labels(s), dp_rank)
    reporter = Reporter(observer, config.request_log_text) if rank0 else None
    ports = ports_of(s, config, model, Trouble(observer))
    table, capacity = ports.requests.table, ports.kv.capacity_tokens
    look_up, groups = PrefixLookUp(ports.kv, table), PrefixGroups(ports.kv.page_tokens)
    pins = Pins(s.tree_cache, table, int(MOST_PINNED_SHARE * capacity), look_up.look_up)
    held = HeldPrefills(ports.kv, table, ports.waiting)
    link, lora = _link(s), bool(s.enable_lora)
    several = s.is_hybrid_swa or s.is_hybrid_ssm  # a copy has one pool's KV
    host = None if several else s.make_host_pool()
    preempt = Preemptor(ports, host, look_up, pins, held, lora, link)
    lengths = s.make_lengths() if rank0 else None
    lifecycle = Lifecycle(ports, look_up, groups, pins, held, reporter, lengths)
    viewer = lifecycle.viewer = Viewer(ports, preempt, pins, look_up, lifecycle.open)
    fit, planner = OnlineFit(model, overlap, log=rank0), Planner(config)
    applier = Applier(ports, look_up, held, lifecycle.refused)
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
