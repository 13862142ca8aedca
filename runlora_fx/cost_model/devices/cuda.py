"""GPUs of type ``cuda``: identified by name and capability. TF32 and cuBLAS change their times.

Example: ``"NVIDIA A100-SXM4-40GB 8.0, 108 multiprocessors"`` with
``{"deterministic": False, "blas": "Cublas", "fp32_precision": "tf32"}``.

Invariant: the profile depends on the model and the settings only.
"""

from __future__ import annotations

import torch

from runlora_fx.cost_model.devices.device import Device, Settings, environment, fp32_precision
from runlora_fx.cost_model.profile import MachineProfile
from runlora_fx.cost_model.published import (
    LAUNCH_S,
    REACHED_BANDWIDTH,
    REACHED_FLOPS,
    pointwise_times,
)

#: Dense FLOP per multiprocessor and clock cycle, in 16-bit floats and in single precision, by
#: compute capability, from NVIDIA's architecture whitepapers. A newer capability counts as the
#: newest of these.
_FLOPS_PER_CYCLE = {
    (7, 0): (1024, 128),
    (8, 0): (2048, 128),
    (8, 6): (1024, 256),
    (9, 0): (4096, 256),
    (10, 0): (8192, 256),
    (12, 0): (1024, 256),
}

#: Variables of cuBLAS and the driver: forced TF32, deterministic kernels, synchronous launches.
_ENVIRONMENT = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING")

#: By dtype, the flags of cuBLAS that concern its products.
_FLAGS = {
    "bfloat16": ("allow_bf16_reduced_precision_reduction",),
    "float16": ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation"),
}


class Cuda(Device):
    """GPUs of NVIDIA, and of AMD under ROCm."""

    type = "cuda"
    draws_in_fours = True

    def present(self) -> list[torch.device]:
        """All GPUs that this process may use."""
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]

    def model(self, device: torch.device) -> str:
        """The name, the compute capability, and how many multiprocessors this process may use."""
        found = torch.cuda.get_device_properties(device)
        capability = f"{found.major}.{found.minor}"
        return f"{found.name} {capability}, {found.multi_processor_count} multiprocessors"

    def settings(self, dtype: str) -> Settings:
        """The BLAS library, and how it may round."""
        matmul = torch.backends.cuda.matmul
        found: dict[str, object] = {
            "blas": str(torch.backends.cuda.preferred_blas_library()),
            **{name: getattr(matmul, name) for name in _FLAGS.get(dtype, ())},
            **environment(_ENVIRONMENT),
        }
        if dtype == "float32":
            # Not `allow_tf32`: reading it raises an error once `fp32_precision` was set.
            found["fp32_precision"] = fp32_precision(matmul)
        return found

    def profile(self, device: torch.device, dtype: str) -> MachineProfile:
        """A profile estimated from multiprocessors, clock rates and the width of the bus."""
        properties = torch.cuda.get_device_properties(device)
        known = [c for c in _FLOPS_PER_CYCLE if c <= (properties.major, properties.minor)]
        half, single = _FLOPS_PER_CYCLE[max(known, default=(7, 0))]
        per_cycle: float = half
        if dtype == "float32":
            is_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
            per_cycle = half / 2 if is_tf32 else single
        elif dtype == "float64":
            per_cycle = min(half / 32, single)
        hertz = getattr(properties, "clock_rate", 1.7e6) * 1e3
        cycles = properties.multi_processor_count * hertz
        rate = cycles * per_cycle * REACHED_FLOPS
        # Double data rate: two transfers a clock cycle, each as wide as the bus.
        memory_hertz = getattr(properties, "memory_clock_rate", 2.6e6) * 1e3
        bus_bytes = getattr(properties, "memory_bus_width", 5120) / 8
        bandwidth = 2 * memory_hertz * bus_bytes * REACHED_BANDWIDTH
        return MachineProfile(
            {
                "flops.nn": 1 / rate,
                "read": 1 / bandwidth,
                "launches": LAUNCH_S,
                **pointwise_times(cycles * single),
            }
        )

    def synchronise(self, device: torch.device) -> None:
        """Wait for the kernels of all streams."""
        torch.cuda.synchronize(device)


DEVICE = Cuda()
