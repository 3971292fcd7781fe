"""The names of all metrics, what they mean and which labels they have; figures of status to their metric."""

from __future__ import annotations

PREFIX = "sglang_slo_"
TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60, 120, 300)
E2E_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1200, 3600)
GAP_BUCKETS_S = (
    *(0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5),
    *(1, 2, 5, 10, 30, 60, 120, 300),
)
USED_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)

BY_CLASS = ("slo_class",)
COUNTERS = {  # without `_total`, which the client adds
    "requests": ("Requests that arrived", BY_CLASS),
    "requests_without_limits": ("Of these, requests that came without any limit", BY_CLASS),
    "finished_requests": (
        "Requests that left; finish: stop, length, abort, rejected, shed, error",
        ("slo_class", "finish"),
    ),
    "judged_requests": ("Requests with a limit that count towards attainment", BY_CLASS),
    "attained_requests": ("Of these, requests that were given everything they declared", BY_CLASS),
    "attained_by_rule_requests": (
        "Of the judged, requests that attain if their gap limit is read as: every, paced, p99, mean",
        ("slo_class", "rule"),
    ),
    "missed_requests": (
        "Judged requests that missed, once for each reason: ttft, gap, pause, pace, tpot, e2e, shed, error",
        ("slo_class", "reason"),
    ),
    "shed_requests": (
        "Requests that the server turned away: queue_limit, queue_full, waiting_timeout, running_timeout, "
        "displaced, other",
        ("slo_class", "reason"),
    ),
    "unattainable_requests": ("Requests with a limit that the hardware cannot keep", BY_CLASS),
    "output_tokens": ("Tokens generated for finished requests", BY_CLASS),
    "attained_output_tokens": ("Tokens generated for requests that attained", BY_CLASS),
    "parks": ("Times a half-prefilled request was set aside", BY_CLASS),
    "recomputed_tokens": ("Tokens prefilled again after a preemption", BY_CLASS),
    "preemptions": (
        "Preemptions of decoding requests, by where the KV went: keep, swap, recompute; stock: SGLang's own",
        ("mode",),
    ),
    "swap_ins": ("Requests whose KV came back from host memory", ()),
    "failed_copies": ("Copies of KV to or from the host that failed", ()),
    "length_errors": ("Errors of the length predictor, which then took the client's word", ()),
    "length_store_errors": ("Times learnt lengths could not be saved or read", ()),
    "length_training_failures": ("Trainings of a length model that failed", ()),
    "fallbacks": ("Iterations planned by stock scheduling because ours raised", ()),
    "observer_errors": ("Errors in counting and reporting that cost figures, not service", ()),
    "request_log_rows_lost": ("Rows of the request log that could not be written", ()),
    "latency_refits": ("Times the latency model was fitted anew", ()),
    "length_models_trained": ("Length models trained and taken", ()),
    "length_models_rejected": ("Length models trained and found no better", ()),
}
HTTP_COUNTERS = {  # of the HTTP processes, without SGLang's labels
    "http_requests": (
        "Requests for the model by the endpoint that they came by; limits: with, without",
        ("endpoint", "limits"),
    ),
}
HISTOGRAMS = {
    "ttft_seconds": ("Arrival to first token", TTFT_BUCKETS_S),
    "e2e_seconds": ("Arrival to last token", E2E_BUCKETS_S),
    "longest_pause_seconds": ("Longest gap between deliveries of a request", GAP_BUCKETS_S),
    "tbt_p99_seconds": ("99th percentile gap between deliveries of a request", GAP_BUCKETS_S),
    "tpot_seconds": ("Mean time per token of a request after its first", GAP_BUCKETS_S),
    "ttft_limit_used_ratio": ("TTFT as a share of its limit", USED_BUCKETS),
    "tbt_limit_used_ratio": (
        "Gap that is judged, longest or 99th percentile, as a share of its limit",
        USED_BUCKETS,
    ),
}
IN_WINDOW = ("slo_class", "window")
GAUGES = {
    "build_info": ("1; version and policy of the scheduler", ("policy", "version")),
    "limit_seconds": ("Limits of each declared class", ("limit", "slo_class")),
    "attainment_ratio": ("Share of judged requests that attained what they declared", IN_WINDOW),
    "attainment_by_rule_ratio": (
        "Share of judged requests that attain by each rule",
        ("rule", "slo_class", "window"),
    ),
    "longest_pause_p99_seconds": ("99th percentile, over requests, of their longest pause", IN_WINDOW),
    "longest_pause_max_seconds": ("Longest pause of any request", IN_WINDOW),
    "goodput_requests_per_second": ("Attained requests per second", IN_WINDOW),
    "goodput_tokens_per_second": ("Output tokens of attained requests per second", IN_WINDOW),
    "waiting_requests": ("Waiting requests", BY_CLASS),
    "oldest_waiting_seconds": ("Longest time that a waiting request has been without a token", ()),
    "running_requests": ("Requests decoding", ()),
    "parked_requests": ("Half-prefilled requests set aside", ()),
    "preempted_requests": ("Preempted requests waiting to come back", ()),
    "given_up_requests": ("Waiting requests given up, for now, as unable to meet their limit", ()),
    "budget_seconds": ("Time the planned iteration may take; absent: no limit in force", ()),
    "planned_prefill_tokens": ("Prefill tokens of the planned iteration", ()),
    "plan_seconds": ("Time the last plan took", ()),
    "kv_capacity_tokens": ("KV pool", ()),
    "kv_free_tokens": ("KV that is free", ()),
    "kv_evictable_tokens": ("KV of cached prefixes that can be evicted", ()),
    "kv_held_tokens": ("KV held by requests", ()),
    "kv_forecast_peak_tokens": ("Most KV that those who decode are expected to hold", ()),
    "kv_reserve_tokens": ("KV kept free against wrong forecasts", ()),
    "kv_arrival_reserve_tokens": ("KV kept free for urgent arrivals", ()),
    "kv_pinned_tokens": ("KV of prefixes kept for requests that wait", ()),
    "host_kv_used_tokens": ("KV on the host", ()),
    "host_kv_capacity_tokens": ("Room for KV on the host", ()),
    "swap_crossing_tokens": ("Context from which swapping is cheaper than computing again; +Inf: never", ()),
    "latency_coefficient_seconds": ("Coefficients of the latency model", ("coefficient",)),
    "latency_drift_ratio": ("Median of measured over profiled iteration time", ()),
    "latency_margin_decode_ratio": ("Measured over predicted time that decodes alone are given", ()),
    "latency_margin_extend_ratio": ("Measured over predicted time that budgets with prefill honour", ()),
    "latency_samples": ("Iterations that the latency model is fitted to", ()),
    "length_level": ("Predictor in force: 0 model, 1 previous, 2 class, 3 everybody, 4 declared maximum", ()),
    "length_model_rows": ("Finished requests that the length model learnt from", ()),
    "length_kept_rows": ("Finished requests kept to learn from", ()),
    "length_coverage_50_ratio": ("Share of lengths below their predicted median", ()),
    "length_coverage_90_ratio": ("Share of lengths below their predicted 90th percentile", ()),
    "length_training": ("1 while a length model is being trained", ()),
    "headroom_tokens_per_second": (
        "Prefill tokens a second to spare beside the load, times attainment",
        BY_CLASS,
    ),
    "headroom_kv_tokens": ("KV to spare beside the load, times attainment", BY_CLASS),
}
# A gauge of windows to where its figure stands in a class's report.
WINDOW_GAUGES = {
    "attainment_ratio": ("attainment",),
    "longest_pause_p99_seconds": ("longest_pause_ms", "p99"),
    "longest_pause_max_seconds": ("longest_pause_ms", "max"),
    "goodput_requests_per_second": ("goodput_rps",),
    "goodput_tokens_per_second": ("goodput_tokens_per_s",),
}
# Figures of `Gauges` mappings to their metric.
KV = {
    figure: f"kv_{figure}_tokens"
    for figure in (
        "capacity",
        "free",
        "evictable",
        "held",
        "forecast_peak",
        "reserve",
        "arrival_reserve",
        "pinned",
    )
}
SWAP = {
    "host_used": "host_kv_used_tokens",
    "host_capacity": "host_kv_capacity_tokens",
    "crossing": "swap_crossing_tokens",
}
LATENCY = {
    "drift": "latency_drift_ratio",
    "margin_decode": "latency_margin_decode_ratio",
    "margin_extend": "latency_margin_extend_ratio",
    "samples": "latency_samples",
}
NO_COEFFICIENT = {*LATENCY, "refits"}
LENGTHS = {
    "level_number": "length_level",
    "model_rows": "length_model_rows",
    "kept_rows": "length_kept_rows",
    "coverage_50": "length_coverage_50_ratio",
    "coverage_90": "length_coverage_90_ratio",
    "training": "length_training",
}
LENGTH_COUNTERS = {
    "trained": "length_models_trained",
    "rejected": "length_models_rejected",
    "training_failures": "length_training_failures",
    "errors": "length_errors",
    "store_errors": "length_store_errors",
}
