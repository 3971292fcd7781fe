"""The device that a command line or a workload names: a measured one, or a latency profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_slo.core.latency import LatencyModel
from sglang_slo.twin.devices.device import Device
from sglang_slo.twin.devices.measured import measured
from sglang_slo.twin.devices.profiled import ProfiledDevice
from sglang_slo.twin.devices.profiles import load_profile
from sglang_slo.twin.devices.spec import DeviceSpec
from sglang_slo.twin.devices.startup import startup_profile


def device_of(spec: DeviceSpec) -> tuple[Device, LatencyModel]:
    """A measured device, and what a scheduler knows of it as it starts. Raises DeviceError."""
    device = measured(spec)
    return device, startup_profile(device)


def profile_of(name_or_path: str, beside: Path | None = None) -> tuple[Device, LatencyModel]:
    """A latency profile as a device, and the same for the scheduler. Raises ProfileError."""
    profile = load_profile(name_or_path, beside)
    return ProfiledDevice(profile), profile


def named(text: str) -> tuple[Device, LatencyModel]:
    """From a command line: a profile's name or file, else MODEL,SYSTEM. Raises DeviceError or ProfileError."""
    return device_of(DeviceSpec.parse(text)) if "," in text else profile_of(text)


def described(raw: dict[str, Any], path: Path) -> tuple[Device, LatencyModel]:
    """From a workload's YAML: `device`, else `profile`. Raises DeviceError or ProfileError."""
    if "device" in raw:
        return device_of(DeviceSpec.of(raw["device"], f"{path}: device"))
    return profile_of(str(raw.get("profile", "h200-llama3-8b")), path.parent)
