"""Intel's GPUs, of type ``xpu``: identified by name. oneDNN's rounding changes their times.

Example: ``"Intel(R) Data Center GPU Max 1550, 1024 units"`` with ``{"deterministic": False}``.

Invariant: the profile depends on the model and the settings only. Its numbers are from data sheets
and were not compared with a device.
"""

from __future__ import annotations

from typing import Any

import torch

from runlora_fx.cost_model.devices.device import Device, Settings, environment, fp32_precision
from runlora_fx.cost_model.profile import MachineProfile
from runlora_fx.cost_model.published import REACHED_FLOPS, pointwise_times

#: FLOP per vector engine and clock cycle of Arc GPUs, in 16-bit floats and in single precision.
_FLOPS_PER_CYCLE = (128, 16)
_HERTZ = 2e9
_BYTES_PER_S = 4.5e11

_ENVIRONMENT = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")

#: torch creates these attributes at import, so a type checker does not see them.
_ONEDNN: Any = torch.backends.mkldnn


class Xpu(Device):
    """Intel's GPUs."""

    type = "xpu"

    def present(self) -> list[torch.device]:
        """All GPUs that this process may use."""
        return [torch.device("xpu", i) for i in range(torch.xpu.device_count())]

    def model(self, device: torch.device) -> str:
        """The name, and the number of vector engines."""
        properties = torch.xpu.get_device_properties(device)
        return f"{properties.name}, {properties.gpu_eu_count} units"

    def settings(self, dtype: str) -> Settings:
        """How oneDNN may round 32-bit operands."""
        found: dict[str, object] = {**environment(_ENVIRONMENT)}
        if dtype == "float32":
            found["fp32_precision"] = fp32_precision(_ONEDNN.matmul)
            # An older switch, which only Intel's GPUs use.
            found["allow_tf32"] = torch.backends.mkldnn.allow_tf32
        return found

    def profile(self, device: torch.device, dtype: str) -> MachineProfile:
        """A profile estimated from the number of vector engines."""
        half, single = _FLOPS_PER_CYCLE
        per_cycle = {"float64": single / 2, "float32": single}.get(dtype, half)
        units = torch.xpu.get_device_properties(device).gpu_eu_count
        rate = units * _HERTZ * per_cycle * REACHED_FLOPS
        pointwise = pointwise_times(units * _HERTZ * single)
        return MachineProfile(
            {"flops.nn": 1 / rate, "read": 1 / _BYTES_PER_S, "launches": 1e-5, **pointwise}
        )

    def synchronise(self, device: torch.device) -> None:
        """Wait for the kernels of all streams."""
        torch.xpu.synchronize(device)


DEVICE = Xpu()
