"""Limits that must be refused, for the parser's tests and for those of a real server.

Each row: what it is, the `slo` field as JSON text (None: absent), headers, and the field to be named.
"""

from __future__ import annotations

BadLimit = tuple[str, str | None, dict[str, str], str]

BODY: list[BadLimit] = [
    (name, text, {}, field)
    for name, text, field in [
        ("text for an object", '"500"', "slo"),
        ("number for an object", "500", "slo"),
        ("true for an object", "true", "slo"),
        ("empty object", "{}", "slo"),
        ("empty text", '""', "slo"),
        ("negative", '{"ttft_ms": -1}', "slo.ttft_ms"),
        ("zero", '{"tbt_ms": 0}', "slo.tbt_ms"),
        ("NaN", '{"ttft_ms": NaN}', "slo.ttft_ms"),
        ("infinity", '{"tbt_ms": Infinity}', "slo.tbt_ms"),
        ("minus infinity", '{"tbt_ms": -Infinity}', "slo.tbt_ms"),
        ("infinite by overflow", '{"ttft_ms": 1e999}', "slo.ttft_ms"),
        ("huge", '{"ttft_ms": 1e10}', "slo.ttft_ms"),
        ("huge integer", '{"ttft_ms": %s}' % ("9" * 400), "slo.ttft_ms"),
        ("text for a number", '{"ttft_ms": "500"}', "slo.ttft_ms"),
        ("empty text for a number", '{"tbt_ms": ""}', "slo.tbt_ms"),
        ("true for a number", '{"ttft_ms": true}', "slo.ttft_ms"),
        ("list for a number", '{"ttft_ms": [500]}', "slo.ttft_ms"),
        ("nested", '{"ttft_ms": {"ms": 500}}', "slo.ttft_ms"),
        ("nested twice", '{"slo": {"ttft_ms": 500}}', "slo.slo"),
        ("unknown field", '{"ttft": 500}', "slo.ttft"),
        ("header's spelling in the body", '{"ttft-ms": 500}', "slo.ttft-ms"),
        ("denormal", '{"ttft_ms": 1e-320}', "slo.ttft_ms"),
        ("less than a microsecond", '{"tbt_ms": 0.0005}', "slo.tbt_ms"),
        ("negative mean", '{"tpot_ms": -5}', "slo.tpot_ms"),
        ("text for an end", '{"e2e_ms": "1s"}', "slo.e2e_ms"),
        ("text for a pace", '{"tbt_ms": 50, "pace": "yes"}', "slo.pace"),
        ("text for whether to tell the verdict", '{"verdict": "yes"}', "slo.verdict"),
        ("null pace", '{"tbt_ms": 50, "pace": null}', "slo.pace"),
        ("pace of nothing", '{"ttft_ms": 500, "pace": true}', "slo.pace"),
        ("pace and percentile", '{"tbt_ms": 50, "pace": true, "percentile": 99}', "slo.pace"),
        ("another percentile", '{"tbt_ms": 50, "percentile": 95}', "slo.percentile"),
        ("true for a percentile", '{"tbt_ms": 50, "percentile": true}', "slo.percentile"),
        ("percentile of nothing", '{"ttft_ms": 500, "percentile": 99}', "slo.percentile"),
        ("pause without percentile", '{"tbt_ms": 50, "max_pause_ms": 900}', "slo.max_pause_ms"),
        ("pause below the gap", '{"tbt_ms": 50, "percentile": 99, "max_pause_ms": 9}', "slo.max_pause_ms"),
        ("importance is not for clients", '{"importance": 9}', "slo.importance"),
        ("lone surrogate", '{"\\ud800": 1}', "slo."),
        ("endless key", '{"%s": 1}' % ("k" * 100_000), "slo."),
        ("endless text", '{"class": "%s"}' % ("k" * 100_000), "slo.class"),
        ("deep", '{"ttft_ms": %s}' % ("[" * 700 + "]" * 700), "slo"),
        ("deeper", '{"ttft_ms": %s}' % ("[" * 985 + "]" * 985), "slo"),
        ("wrong case", '{"TTFT_ms": 500}', "slo.TTFT_ms"),
        ("good beside unknown", '{"ttft_ms": 500, "priority": 1}', "slo.priority"),
        ("unknown class", '{"class": "gold"}', "slo.class"),
        ("class in the wrong case", '{"class": "Chat"}', "slo.class"),
        ("empty class", '{"class": ""}', "slo.class"),
        ("number for a class", '{"class": 1}', "slo.class"),
        ("null class", '{"class": null}', "slo.class"),
        ("duplicate field", '{"ttft_ms": 500, "ttft_ms": 900}', "ttft_ms"),
        ("our own mark", '{"ttft_ms": 5, "tbt_ms": 5, "class": "chat", "resolved": true}', "slo.resolved"),
        ("list for a single request", '[{"ttft_ms": 500}]', "slo"),
    ]
]

HEADER: list[BadLimit] = [
    (name, None, headers, field)
    for name, headers, field in [
        ("negative header", {"x-slo-ttft-ms": "-5"}, "x-slo-ttft-ms"),
        ("zero header", {"x-slo-tbt-ms": "0"}, "x-slo-tbt-ms"),
        ("NaN header", {"x-slo-tbt-ms": "nan"}, "x-slo-tbt-ms"),
        ("infinite header", {"x-slo-ttft-ms": "inf"}, "x-slo-ttft-ms"),
        ("overflowing header", {"x-slo-ttft-ms": "1e999"}, "x-slo-ttft-ms"),
        ("header with an unknown unit", {"x-slo-ttft-ms": "500min"}, "x-slo-ttft-ms"),
        ("header with two units", {"x-slo-ttft-ms": "5s500ms"}, "x-slo-ttft-ms"),
        ("seconds beyond all limits", {"x-slo-ttft-s": "1e9"}, "x-slo-ttft-s"),
        ("microseconds below all limits", {"x-slo-e2e-us": "0.5"}, "x-slo-e2e-us"),
        ("zero mean", {"x-slo-tpot-ms": "0"}, "x-slo-tpot-ms"),
        ("doubtful pace header", {"x-slo-tbt-ms": "50", "x-slo-pace": "maybe"}, "x-slo-pace"),
        ("pace of nothing in headers", {"x-slo-pace": "true"}, "x-slo-pace"),
        ("another percentile in a header", {"x-slo-percentile": "95"}, "x-slo-percentile"),
        (
            "pause without percentile in headers",
            {"x-slo-tbt-ms": "5", "x-slo-max-pause-ms": "9"},
            "x-slo-max-pause-ms",
        ),
        ("SGLang's prefix", {"x-sgl-slo-ttft-ms": "-1"}, "x-sgl-slo-ttft-ms"),
        ("tracestate", {"tracestate": "a=b,slo=ttft:soon"}, "tracestate slo.ttft"),
        ("tracestate without a value", {"tracestate": "slo=ttft"}, "tracestate slo.ttft"),
        ("tracestate with an unknown field", {"tracestate": "slo=tftt:5"}, "tracestate slo.tftt"),
        ("header with an underscore", {"x-slo-ttft-ms": "1_000"}, "x-slo-ttft-ms"),
        ("hexadecimal header", {"x-slo-ttft-ms": "0x10"}, "x-slo-ttft-ms"),
        ("empty header", {"x-slo-ttft-ms": ""}, "x-slo-ttft-ms"),
        ("empty class header", {"x-slo-class": ""}, "x-slo-class"),
        ("unknown class header", {"x-slo-class": "gold"}, "x-slo-class"),
        ("misspelt header", {"x-slo-ttft": "500"}, "x-slo-ttft"),
        ("spellings at odds", {"x-slo-tpot-ms": "40", "x-llm-d-slo-tpot-ms": "50"}, "x-llm-d-slo-tpot-ms"),
        ("units at odds", {"x-slo-ttft-ms": "40", "x-slo-ttft-s": "5"}, "x-slo-ttft-s"),
        ("llm-d at odds", {"x-slo-ttft-ms": "40", "x-llm-d-slo-ttft-ms": "50"}, "x-llm-d-slo-ttft-ms"),
        ("text in an llm-d header", {"x-llm-d-slo-tpot-ms": "fast"}, "x-llm-d-slo-tpot-ms"),
    ]
]

BAD = BODY + HEADER
