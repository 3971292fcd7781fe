"""Decisions: who is served, how much of a prompt, who gives way and how, and whether a promise was kept.

May import numpy, and scipy where a fit needs it; no sglang, no torch, no clock, no I/O: `now` is an argument.
Always: the same input gives the same plan, on every rank and on every day.
"""
