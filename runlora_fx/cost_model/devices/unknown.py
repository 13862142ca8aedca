"""Unknown devices: every type of device that has no file here.

Example: ``torch.device("npu", 0)`` has the model ``"npu"``, with its name if torch reports one, and
the default profile until a calibration measures it.

Invariant: no method raises an error, whatever the type of the device, and even if there is none.
"""

from __future__ import annotations

from typing import Any

import torch

from runlora_fx.cost_model.devices.device import Device, Settings, fp32_precision
from runlora_fx.cost_model.profile import DEFAULT_PROFILE, MachineProfile

#: torch creates these attributes at import, so a type checker does not see them.
_BACKENDS: Any = torch.backends


class Unknown(Device):
    """A device of some other kind."""

    type = "unknown"

    def present(self) -> list[torch.device]:
        """The accelerators of this machine, of any type."""
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None:
            return []
        count = range(torch.accelerator.device_count())
        return [torch.device(accelerator.type, i) for i in count]

    def model(self, device: torch.device) -> str:
        """The type, and the name if torch reports one."""
        try:
            named = torch.get_device_module(device).get_device_name(device)
        except (RuntimeError, AttributeError, AssertionError):
            return device.type
        return f"{device.type} {named}"

    def settings(self, dtype: str) -> Settings:
        """How torch's backends may round 32-bit operands."""
        if dtype != "float32":
            return {}
        return {"fp32_precision": fp32_precision(_BACKENDS)}

    def profile(self, device: torch.device, dtype: str) -> MachineProfile:
        """The default profile."""
        return DEFAULT_PROFILE

    def synchronise(self, device: torch.device) -> None:
        """Wait for the accelerator, if it is one."""
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type == device.type:
            torch.accelerator.synchronize(device)


DEVICE = Unknown()
