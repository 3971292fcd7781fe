"""Every setting of the scheduler, once: name, unit, default, meaning, and what is accepted.

`settings_in` reads them from flags and files; `to_env`/`from_env` carry them into SGLang's scheduler processes, which
are started afresh and inherit only the environment.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_slo.classes import (
    NUMBERS_MS,
    PERCENTILE,
    ConfigError,
    contradiction,
    is_limit,
    read_classes,
    read_names,
)
from sglang_slo.core.orders import ORDERS
from sglang_slo.core.slo import MAX_LIMIT_MS, MIN_LIMIT_MS, SloClass

__all__ = ["ENV", "ConfigError", "SloConfig", "read_classes", "settings"]

ENV = "SGLANG_SLO_CONFIG"
MAPS = ("classes", "service_tiers", "objectives")  # settings that need a file


def _setting(default: Any, help: str, choices: tuple[str, ...] | None = None, low: float = -math.inf) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "low": low})


@dataclass(frozen=True)
class SloConfig:
    """Settings of one server. Names are the flags' names without `--slo-`."""

    policy: str = _setting("slo", "slo: our scheduler; off: stock SGLang, bit for bit", ("slo", "off"))
    # -- what is promised
    ttft_ms: float | None = _setting(
        None, "default limit on time to first token, ms (none: best effort)", low=0
    )
    tbt_ms: float | None = _setting(
        None, "default limit on the gap between tokens, ms (none: best effort)", low=0
    )
    tpot_ms: float | None = _setting(
        None, "default limit on the mean time per output token after the first, ms", low=0
    )
    e2e_ms: float | None = _setting(None, "default limit from arrival to the last token, ms", low=0)
    pace: bool = _setting(False, "the default gap limit is a reader's pace, not a limit of each gap")
    percentile: int | None = _setting(
        None, "99: 1 in 100 gaps may pass the default gap limit (none: no gap may)", low=0
    )
    max_pause_ms: float | None = _setting(
        None, "longest gap that slo-percentile permits, ms (none: ten times the gap limit)", low=0
    )
    default_class: str | None = _setting(None, "class of requests that name none")
    classes_only: bool = _setting(False, "accept declared classes only, no numbers from clients")
    min_ttft_ms: float = _setting(
        0.0, "floor: a tighter TTFT or end-to-end limit is raised to this, ms", low=0
    )
    min_tbt_ms: float = _setting(0.0, "floor: a tighter TBT or TPOT limit is raised to this, ms", low=0)
    require: bool = _setting(False, "refuse (HTTP 400) requests that come without any limit")
    refuse: str = _setting(
        "none",
        "hopeless: refuse (HTTP 429) at arrival what cannot meet its limits any more; none: serve it late",
        ("none", "hopeless"),
    )
    classes: Mapping[str, SloClass] = field(default_factory=dict, metadata={"help": "only in the YAML file"})
    service_tiers: Mapping[str, str] = field(
        default_factory=dict, metadata={"help": "OpenAI's service_tier to class; only in the YAML file"}
    )
    objectives: Mapping[str, str] = field(
        default_factory=dict,
        metadata={"help": "a gateway's inference objective to class; only in the YAML file"},
    )
    # -- parts that can be switched off one by one
    chunk: str = _setting(
        "dynamic", "prefill chunk: dynamic fits the tightest gap, fixed is SGLang's", ("dynamic", "fixed")
    )
    order: str = _setting(
        "edf",
        "order of the queue: earliest deadline first among those that can keep it (edf), shortest predicted output first "
        "(shortest), or SGLang's (stock)",
        tuple(ORDERS),
    )
    packing: str = _setting(
        "dual", "fill compute and KV together (dual) or in order (greedy)", ("dual", "greedy")
    )
    mix: str = _setting("auto", "prefill beside decode in one iteration", ("auto", "always", "never"))
    park: bool = _setting(True, "a half-prefilled request may be set aside for a more urgent one")
    decode_buckets: bool = _setting(True, "looser decodes may sit an iteration out for a tighter one")
    length: str = _setting("xgboost", "predictor of output lengths", ("xgboost", "mean", "none"))
    bound: str = _setting("conformal", "how a predicted length is bounded", ("conformal", "hoeffding"))
    kv: str = _setting(
        "forecast",
        "KV admission: forecast of the peak (forecast), every bound in full (full), SGLang's ratio (stock)",
        ("forecast", "full", "stock"),
    )
    preempt: str = _setting(
        "auto",
        "where a preempted request's KV goes: cheapest (auto), radix tree (keep), host (swap), nowhere",
        ("auto", "keep", "swap", "recompute", "stock"),
    )
    victims: str = _setting(
        "auto",
        "whom to give up among those who miss a promise by it: by KV held (kv), by KV held and still needed (area), by "
        "area once predicted lengths have shown to be worth it (auto), or who came last (latest)",
        ("auto", "kv", "area", "latest"),
    )
    # -- sizes and shares
    lost_share: float = _setting(
        0.05, "share of prefill tokens kept for requests that cannot meet their limit any more", low=0
    )
    lost_wait_s: float | None = _setting(
        1800.0,
        "after so long without a token, one that cannot meet its limit is not overtaken any more, s; none: it keeps its "
        "share of tokens, and waits until the forecast has room for it",
        low=0,
    )
    queue_limit_s: float | None = _setting(
        None, "shed (HTTP 503) what would wait longer, s; none: never", low=0
    )
    margin: float = _setting(0.05, "share of a gap allowance that is left unused", low=0)
    idle_cap_ms: float = _setting(
        200.0,
        "longest iteration while nobody decodes, ms; if it costs half of that empty, twice its cost",
        low=1,
    )
    confidence_high: float = _setting(0.9, "confidence of length bounds on an idle server", low=0)
    confidence_low: float = _setting(0.6, "confidence of length bounds at and above capacity", low=0)
    lookahead_tokens: int = _setting(
        100,
        "output per request that KV admission looks ahead, tokens; what comes later is left to preemption",
        low=1,
    )
    return_lookahead_tokens: int = _setting(
        300,
        "output per request that KV admission looks ahead before it lets in one that cannot meet its limit, tokens",
        low=1,
    )
    reserve_floor: float = _setting(0.01, "least share of KV kept in reserve", low=0)
    reserve_ceiling: float = _setting(
        0.1, "largest share of KV kept in reserve; between the two it follows the forecast's error", low=0
    )
    arrival_reserve: float = _setting(
        0.1,
        "largest share of KV that requests without a deadline to keep leave to arrivals that have one; "
        "as much of it as these asked for in the last 30 s",
        low=0,
    )
    max_preemptions: int = _setting(16, "no request is preempted more often than this", low=0)
    host_kv_gb: float = _setting(0.0, "host memory for swapped KV, GB (0: no swap)", low=0)
    # -- files
    profile: str | None = _setting(
        None, "latency profile JSON; none: measured at start-up and kept in the cache folder"
    )
    model_dir: str | None = _setting(None, "folder of the length model; none: in the cache folder")
    request_log: str | None = _setting(None, "JSONL file of finished requests; none: no log")
    request_log_text: bool = _setting(False, "write prompts into the request log")
    request_log_mb: float = _setting(64.0, "rotate the request log at this size, MB", low=0.001)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check(f, getattr(self, f.name))
        self._check_limits()
        if not self.confidence_low <= self.confidence_high < 1:
            raise ConfigError("slo-confidence-low/high: need low <= high < 1")
        if not self.lost_share < 1:
            raise ConfigError(f"slo-lost-share: need a share in [0, 1), got {self.lost_share}")
        if not self.arrival_reserve < 1:
            raise ConfigError(f"slo-arrival-reserve: need a share in [0, 1), got {self.arrival_reserve}")
        if not self.margin < 1:
            raise ConfigError(f"slo-margin: need a share in [0, 1), got {self.margin}")
        if not self.reserve_floor <= self.reserve_ceiling < 1:
            got = f"{self.reserve_floor} and {self.reserve_ceiling}"
            raise ConfigError(f"slo-reserve-floor/ceiling: need floor <= ceiling < 1, got {got}")
        if self.default_class is not None and self.default_class not in self.classes:
            raise ConfigError(
                f"slo-default-class: {self.default_class!r} is not among {sorted(self.classes)}"
            )

    def _check_limits(self) -> None:
        for name in NUMBERS_MS:
            value = getattr(self, name)
            if value is not None and not is_limit(value):
                flag = "slo-" + name.replace("_", "-")
                raise ConfigError(
                    f"{flag}: need a number of ms from {MIN_LIMIT_MS:g} to {MAX_LIMIT_MS:g}, got {value!r}"
                )
        if self.percentile not in (None, PERCENTILE):
            raise ConfigError(f"slo-percentile: need {PERCENTILE}, got {self.percentile!r}")
        problem = contradiction(self.default_limits())
        if problem is not None:
            raise ConfigError(f"slo-{problem[0].replace('_', '-')}: {problem[1]}")
        read_names(self.service_tiers, self.classes, "service_tiers")
        read_names(self.objectives, self.classes, "objectives")

    def default_limits(self) -> SloClass:
        """The limits of a request that says nothing, on a server without a default class."""
        return SloClass(
            self.ttft_ms,
            self.tbt_ms,
            self.tpot_ms,
            self.e2e_ms,
            self.pace,
            self.percentile,
            self.max_pause_ms,
        )

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads back."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> SloConfig:
        """Inverse of `to_json`."""
        raw = json.loads(text)
        raw["classes"] = {k: SloClass(**v) for k, v in raw.get("classes", {}).items()}
        return SloConfig(**raw)

    def to_env(self) -> None:
        """Leave the settings in the environment for the processes started from here."""
        os.environ[ENV] = self.to_json()

    @staticmethod
    def from_env() -> SloConfig | None:
        """The settings left by `to_env`, None if the scheduler is not switched on."""
        text = os.environ.get(ENV)
        return SloConfig.from_json(text) if text else None


def _check(f: dataclasses.Field[Any], value: Any) -> None:
    choices, low = f.metadata.get("choices"), f.metadata.get("low", -math.inf)
    flag = "slo-" + f.name.replace("_", "-")
    if choices and value not in choices:
        raise ConfigError(f"{flag}: need one of {', '.join(choices)}, got {value!r}")
    if "float" in str(f.type) or str(f.type).startswith("int"):
        if value is None:
            if "None" not in str(f.type):
                raise ConfigError(f"{flag}: need a number")
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{flag}: need a number, got {value!r}")
        if not math.isfinite(value) or value < low:
            raise ConfigError(f"{flag}: need a finite number of at least {low:g}, got {value!r}")
    elif f.type == "bool" and not isinstance(value, bool):
        raise ConfigError(f"{flag}: need true or false, got {value!r}")


def settings() -> list[dataclasses.Field[Any]]:
    """The fields that are also flags (all but the maps, which need a file)."""
    return [f for f in dataclasses.fields(SloConfig) if f.name not in MAPS]
