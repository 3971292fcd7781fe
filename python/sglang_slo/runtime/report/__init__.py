"""Tells what became of requests and how the scheduler stands: to the observer, to SGLang's accounting, to clients.

Decides nothing. May import `runtime.requests`, observe, core and SGLang.
Always: nothing in here influences a plan, and what raises in here costs a report, never a request.
"""
