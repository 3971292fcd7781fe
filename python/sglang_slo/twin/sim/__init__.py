"""One run: a virtual clock, an engine, a worker that answers at once, requests fed in and tokens written down.

Decides nothing: the scheduler under test is the real one. May import devices, workloads, result and runtime.
Always: time moves only when a pass does, and no true output length reaches the scheduler.
"""
