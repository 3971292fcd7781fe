"""The real scheduler in virtual time: `sim` runs it, `devices` tell how long passes take, `workloads` who arrives.

Decides nothing that a server would. May import everything of ours. `bound` and `result` judge what a run was.
Always: the scheduler never sees the device's own model, and the same seed gives the same run.
"""
