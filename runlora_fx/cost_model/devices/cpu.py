"""The CPU: identified by its model and instruction sets. Threads and rounding change its times.

Example: ``"AMD EPYC 7B13 AVX2"`` with ``{"threads": 2, "deterministic": False, "onednn": True}``.

Invariant: the profile depends on the model and the settings only.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from runlora_fx.cost_model.devices.device import Device, Settings, environment, fp32_precision
from runlora_fx.cost_model.profile import MachineProfile
from runlora_fx.cost_model.published import REACHED_FLOPS, pointwise_times

#: FLOP in single precision per core and clock cycle, by instruction set.
_FLOPS_PER_CYCLE = {"AVX512": 64, "AVX2": 32}
_FLOPS_PER_CYCLE_OTHER = 16

#: By CPU flag, the speed of products of 16-bit floats relative to single precision.
_HALF_SPEEDUP = {"amx_bf16": 8, "avx512_bf16": 2}
_HERTZ = 2.5e9
_BYTES_PER_S = 1.2e10

#: Variables that oneDNN and MKL read when they are loaded: they change instructions or rounding.
_ENVIRONMENT = (
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR"),
)

#: torch creates these attributes at import, so a type checker does not see them.
_ONEDNN: Any = torch.backends.mkldnn


class Cpu(Device):
    """The host."""

    type = "cpu"
    is_host = True
    may_upcast = True  # without instructions for 16 bits; with them, measurements say no

    def present(self) -> list[torch.device]:
        """One CPU."""
        return [torch.device("cpu")]

    def model(self, device: torch.device) -> str:
        """The name that the system reports, with the instruction sets."""
        return _model()

    def settings(self, dtype: str) -> Settings:
        """Threads, oneDNN, and the rounding of 32-bit operands."""
        found: dict[str, object] = {
            "threads": torch.get_num_threads(),
            "onednn": torch.backends.mkldnn.enabled,
            **environment(_ENVIRONMENT),
        }
        if dtype == "float32":
            found["fp32_precision"] = fp32_precision(_ONEDNN.matmul)
        return found

    def profile(self, device: torch.device, dtype: str) -> MachineProfile:
        """A profile estimated from the instruction set and the number of threads."""
        itemsize = getattr(torch, dtype).itemsize
        per_cycle = _FLOPS_PER_CYCLE.get(
            torch.backends.cpu.get_cpu_capability(), _FLOPS_PER_CYCLE_OTHER
        )
        single = per_cycle * _HERTZ * torch.get_num_threads()
        rate = single * REACHED_FLOPS
        if itemsize == 8:
            rate /= 2
        elif itemsize == 2:
            rate *= max((_HALF_SPEEDUP[flag] for flag in _half_flags()), default=1)
        bandwidth = _BYTES_PER_S * torch.get_num_threads() ** 0.5
        return MachineProfile(
            {
                "flops.nn": 1 / rate,
                "read": 1 / (2 * bandwidth),
                "written": 1 / bandwidth,
                "launches": 3e-6,
                **pointwise_times(single, is_cpu=True),
            }
        )

    def synchronise(self, device: torch.device) -> None:
        """Nothing to wait for: a call returns when its work is done."""


@cache
def _model() -> str:
    named = (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name"))
    name = next(named, platform.processor() or platform.machine())
    return " ".join([name, torch.backends.cpu.get_cpu_capability(), *_half_flags()])


@cache
def _half_flags() -> tuple[str, ...]:
    """The flags of the CPU's instructions for 16-bit floats."""
    flags = {flag for line in _cpuinfo() if line.startswith("flags") for flag in line.split()}
    return tuple(sorted(flags & _HALF_SPEEDUP.keys()))


@cache
def _cpuinfo() -> tuple[str, ...]:
    """The lines of ``/proc/cpuinfo`` on Linux; empty on other systems."""
    try:
        return tuple(Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
    except OSError:
        return ()


DEVICE = Cpu()
