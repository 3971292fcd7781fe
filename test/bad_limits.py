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
        ("header's spelling in the body", '{"tpot_ms": 500}', "slo.tpot_ms"),
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
        ("header with a unit", {"x-slo-ttft-ms": "500ms"}, "x-slo-ttft-ms"),
        ("header with an underscore", {"x-slo-ttft-ms": "1_000"}, "x-slo-ttft-ms"),
        ("hexadecimal header", {"x-slo-ttft-ms": "0x10"}, "x-slo-ttft-ms"),
        ("empty header", {"x-slo-ttft-ms": ""}, "x-slo-ttft-ms"),
        ("empty class header", {"x-slo-class": ""}, "x-slo-class"),
        ("unknown class header", {"x-slo-class": "gold"}, "x-slo-class"),
        ("misspelt header", {"x-slo-ttft": "500"}, "x-slo-ttft"),
        ("spellings at odds", {"x-slo-tbt-ms": "40", "x-slo-tpot-ms": "50"}, "x-slo-tpot-ms"),
        ("llm-d at odds", {"x-slo-ttft-ms": "40", "x-llm-d-slo-ttft-ms": "50"}, "x-llm-d-slo-ttft-ms"),
        ("text in an llm-d header", {"x-llm-d-slo-tpot-ms": "fast"}, "x-llm-d-slo-tpot-ms"),
    ]
]

BAD = BODY + HEADER
