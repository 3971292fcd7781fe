"""Carries out what a plan says about KV: preemption, copies to the host and back, prefixes kept or noticed late.

Decides nothing: whom and how comes from `core.kv`. May import `runtime.requests`, core and SGLang.
Always: what can fail comes first and changes nothing; no token of KV is held twice or by nobody.
"""
