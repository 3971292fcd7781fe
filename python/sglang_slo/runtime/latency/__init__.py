"""How long iterations take here: measured at the start, fitted while serving, kept on disk between starts.

Decides which latency model is in force, on rank 0 alone. May import `runtime.requests`, core, cpu and SGLang.
Always: without a measurement serving starts on a cautious guess, and a failed fit leaves the last model in force.
"""
