"""A device that is a latency profile: a roofline model, or what a server measured of its own."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_slo.core.latency import LatencyModel
from sglang_slo.twin.devices.device import Pass
from sglang_slo.twin.devices.profiles import cpu_times_s


@dataclass(frozen=True)
class ProfiledDevice:
    """A `Device` whose passes take exactly what `profile` says."""

    profile: LatencyModel

    @property
    def name(self) -> str:
        """The profile's."""
        return self.profile.name

    @property
    def measured(self) -> bool:
        """As the profile says of itself."""
        return self.profile.measured

    @property
    def kv_capacity_tokens(self) -> int:
        """The profile's."""
        return self.profile.kv_capacity_tokens

    @property
    def kv_bytes_per_token(self) -> float:
        """The profile's."""
        return self.profile.kv_bytes_per_token

    @property
    def swap_bytes_per_s(self) -> float:
        """The profile's."""
        return self.profile.swap_bytes_per_s

    @property
    def swap_overhead_s(self) -> float:
        """The profile's."""
        return self.profile.swap_overhead_s

    @property
    def cpu_times_s(self) -> tuple[float, float]:
        """The profile's, or what the twin's own scheduler takes."""
        return cpu_times_s(self.profile)

    def iteration_s(self, load: Pass) -> float:
        """See `LatencyModel`."""
        return self.profile.iteration_s(load.shape)
