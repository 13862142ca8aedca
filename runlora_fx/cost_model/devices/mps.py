"""Apple's GPUs, of type ``mps``: identified by the name of the chip and the number of cores.

Example: ``"Apple M1 Pro, 16 cores"`` with ``{"deterministic": False}``.

Invariant: the profile depends on the model and the settings only. Its numbers are from data sheets
and were not compared with a device.
"""

from __future__ import annotations

import platform
from functools import cache

import torch

from runlora_fx.cost_model.devices.device import Device, Settings, environment
from runlora_fx.cost_model.profile import MachineProfile
from runlora_fx.cost_model.published import REACHED_FLOPS, pointwise_times

#: Rates of one core: multiply-adds in 128 lanes at 1.4 GHz, in 32 and in 16 bits alike; and its
#: share of the memory bandwidth.
_FLOPS_PER_S = 2 * 128 * 1.4e9
_BYTES_PER_S = 1e10

#: The number of cores of the smallest model, for versions of torch that do not report it.
_CORES = 8

_ENVIRONMENT = ("PYTORCH_MPS_PREFER_METAL", "PYTORCH_MPS_FAST_MATH")


class Mps(Device):
    """The GPU of a Mac."""

    type = "mps"

    def present(self) -> list[torch.device]:
        """The GPU, if this machine is a Mac with one."""
        return [torch.device("mps", 0)] if torch.backends.mps.is_available() else []

    def model(self, device: torch.device) -> str:
        """The chip, and the number of cores of its GPU."""
        name = getattr(torch.backends.mps, "get_name", platform.processor)()
        return f"{name}, {_cores()} cores"

    def settings(self, dtype: str) -> Settings:
        """Variables that choose kernels."""
        return environment(_ENVIRONMENT)

    def profile(self, device: torch.device, dtype: str) -> MachineProfile:
        """A profile estimated from the number of cores."""
        rate = _cores() * _FLOPS_PER_S * REACHED_FLOPS
        bandwidth = _cores() * _BYTES_PER_S
        pointwise = pointwise_times(_cores() * _FLOPS_PER_S)
        return MachineProfile(
            {"flops.nn": 1 / rate, "read": 1 / bandwidth, "launches": 1e-5, **pointwise}
        )

    def synchronise(self, device: torch.device) -> None:
        """Wait for the kernels of all streams."""
        torch.mps.synchronize()


@cache
def _cores() -> int:
    count = getattr(torch.backends.mps, "get_core_count", None)
    return int(count()) if count is not None else _CORES


DEVICE = Mps()
