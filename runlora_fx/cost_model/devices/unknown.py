"""Every device that has no file of its own, by what torch knows of all of them.

Example: ``torch.device("npu", 0)`` is called ``"npu"``, or by its name if its module tells one, and
counts as the default machine until a calibration measures it.

Invariant: it raises nothing for any type of device, also for one that is not there.
"""

from __future__ import annotations

from typing import Any

import torch

from runlora_fx.cost_model.devices.device import Device, Settings, fp32_precision
from runlora_fx.cost_model.profile import DEFAULT_PROFILE, MachineProfile

#: Attributes that torch makes when it is imported: a type checker does not see them.
_BACKENDS: Any = torch.backends


class Unknown(Device):
    """A device of some other kind."""

    type = "unknown"

    def present(self) -> list[torch.device]:
        """The accelerators of this machine, whatever they are."""
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None:
            return []
        count = range(torch.accelerator.device_count())
        return [torch.device(accelerator.type, i) for i in count]

    def model(self, device: torch.device) -> str:
        """The type, and the name if the device's module tells one."""
        try:
            named = torch.get_device_module(device).get_device_name(device)
        except (RuntimeError, AttributeError, AssertionError):
            return device.type
        return f"{device.type} {named}"

    def settings(self, dtype: str) -> Settings:
        """How backends in general may round 32-bit operands."""
        if dtype != "float32":
            return {}
        return {"fp32_precision": fp32_precision(_BACKENDS)}

    def profile(self, device: torch.device, dtype: str) -> MachineProfile:
        """The default: a ratio of FLOPs to bytes that most machines resemble."""
        return DEFAULT_PROFILE

    def synchronise(self, device: torch.device) -> None:
        """Wait for the accelerator, if it is one."""
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type == device.type:
            torch.accelerator.synchronize(device)


DEVICE = Unknown()
