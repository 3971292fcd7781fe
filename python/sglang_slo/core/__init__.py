"""Decisions. Pure: no sglang, no torch, no clock, no I/O. `now` is an argument, and the same input gives the same plan."""
