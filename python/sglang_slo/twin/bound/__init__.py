"""An attainment that no scheduler can exceed on a workload and a device, with its derivation.

Decides nothing. May import core, workloads and devices, and knows neither scheduler nor engine.
Always: each constraint is one that every schedule keeps; what is not certain is left out.
"""
