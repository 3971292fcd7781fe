"""What iterations run on in virtual time: a device tells how long a pass takes, and how much KV it has room for.

`Device` is all that the engine knows of it; the scheduler knows nothing of it at all. Two kinds:

    profiled   a latency profile, ours or a server's: most shipped ones are roofline models of a device
    measured   kernel times measured on real GPUs under SGLang, out of `aiconfigurator-core` (extra `devices`)

May import core and, for kernels, `aiconfigurator-core`. Always: a pass with more work never takes less time.
"""

from __future__ import annotations

from sglang_slo.twin.devices.device import Device, Pass
from sglang_slo.twin.devices.profiled import ProfiledDevice
from sglang_slo.twin.devices.spec import DeviceError, DeviceSpec

__all__ = ["Device", "DeviceError", "DeviceSpec", "Pass", "ProfiledDevice"]
