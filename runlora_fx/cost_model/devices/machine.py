"""The machine: what a device is called, what it can do by default, and what is stored about it."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from pathlib import Path

import torch

from runlora_fx.cost_model import store
from runlora_fx.cost_model.profile import MachineProfile
from runlora_fx.cost_model.store import Key, Record

#: The dtypes whose products are planned for time.
DTYPES = ("float64", "float32", "bfloat16", "float16")

#: Of what a device can do at best, the share that products of real sizes reach.
_EFFICIENCY = 0.6

#: FLOP in single precision per core and clock cycle, by instruction set.
_CPU_FLOPS_PER_CYCLE = {"AVX512": 64, "AVX2": 32}
_CPU_FLOPS_PER_CYCLE_OTHER = 16

#: How much faster instructions for 16-bit floats are, by the name of the CPU's flag.
_CPU_HALF_SPEEDUP = {"amx_bf16": 8, "avx512_bf16": 2}
_CPU_HERTZ = 2.5e9
_CPU_BYTES_PER_S = 1.2e10

#: Dense FLOP per multiprocessor and clock cycle, in 16-bit floats and in single precision, by
#: compute capability: those of NVIDIA's architecture whitepapers. A newer device counts as the
#: newest known.
_CUDA_FLOPS_PER_CYCLE = {
    (7, 0): (1024, 128),
    (8, 0): (2048, 128),
    (8, 6): (1024, 256),
    (9, 0): (4096, 256),
    (10, 0): (8192, 256),
    (12, 0): (1024, 256),
}


def key_of(device: torch.device, dtype: str) -> Key:
    """What times measured on a device now hold for."""
    is_cpu = device.type == "cpu"
    return Key(
        device=_cpu_name() if is_cpu else _accelerator_name(device),
        dtype=dtype,
        torch=torch.__version__,
        threads=torch.get_num_threads() if is_cpu else 0,
    )


class Machine:
    """A snapshot of what is known about this machine: one compilation plans by one state of it."""

    def __init__(self, *, use_stored: bool) -> None:
        """Know nothing yet.

        Args:
            use_stored: Whether to use what was measured before.
        """
        self._use_stored = use_stored
        self._records: dict[Key, Record] = {}

    def record(self, device: torch.device, dtype: str) -> Record:
        """What was measured on a device."""
        key = key_of(device, dtype)
        if key not in self._records:
            self._records[key] = store.load(key) if self._use_stored else Record()
        return self._records[key]

    def add(self, device: torch.device, dtype: str, newer: Record) -> None:
        """Know, and store, more about a device."""
        key = key_of(device, dtype)
        self._records[key] = self.record(device, dtype).updated(newer)
        store.add(key, newer)

    def profile(self, device: torch.device, dtype: str) -> MachineProfile:
        """The profile of a device: calibrated if it was, and with the products measured on it."""
        return self.record(device, dtype).profile(default_profile(device, dtype))

    def identity(self) -> str:
        """Changes with every number that a plan can depend on."""
        devices = [torch.device("cpu")]
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        known = [
            (*key_of(device, dtype), self.record(device, dtype).digest)
            for device in devices
            for dtype in DTYPES
        ]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def default_profile(device: torch.device, dtype: str) -> MachineProfile:
    """What a device can be expected to do, from its properties."""
    if device.type == "cuda":
        return _cuda_profile(device, dtype)
    return _cpu_profile(dtype)


def _cpu_profile(dtype: str) -> MachineProfile:
    itemsize = getattr(torch, dtype).itemsize
    per_cycle = _CPU_FLOPS_PER_CYCLE.get(
        torch.backends.cpu.get_cpu_capability(), _CPU_FLOPS_PER_CYCLE_OTHER
    )
    rate = per_cycle * _CPU_HERTZ * torch.get_num_threads() * _EFFICIENCY
    if itemsize == 8:
        rate /= 2
    elif itemsize == 2:
        rate *= max((_CPU_HALF_SPEEDUP[flag] for flag in _half_flags()), default=1)
    bandwidth = _CPU_BYTES_PER_S * torch.get_num_threads() ** 0.5
    return MachineProfile(rate, 2 * bandwidth, bandwidth, bandwidth, 3e-6)


def _cuda_profile(device: torch.device, dtype: str) -> MachineProfile:
    properties = torch.cuda.get_device_properties(device)
    known = [c for c in _CUDA_FLOPS_PER_CYCLE if c <= (properties.major, properties.minor)]
    half, single = _CUDA_FLOPS_PER_CYCLE[max(known, default=(7, 0))]
    per_cycle: float = half
    if dtype == "float32":
        # Not `allow_tf32`: torch does not answer it where this one was set.
        per_cycle = half / 2 if torch.backends.cuda.matmul.fp32_precision == "tf32" else single
    elif dtype == "float64":
        per_cycle = min(half / 32, single)
    hertz = getattr(properties, "clock_rate", 1.7e6) * 1e3
    rate = properties.multi_processor_count * hertz * per_cycle * _EFFICIENCY
    # Twice the clock (double data rate) times the width of the bus.
    memory_hertz = getattr(properties, "memory_clock_rate", 2.6e6) * 1e3
    bus_bytes = getattr(properties, "memory_bus_width", 5120) / 8
    bandwidth = 2 * memory_hertz * bus_bytes * 0.8
    return MachineProfile(rate, bandwidth, bandwidth, bandwidth, 4e-6)


@cache
def _cpu_name() -> str:
    """The CPU's model, as the system names it, with its instruction set."""
    named = (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name"))
    name = next(named, platform.processor() or platform.machine())
    return " ".join([name, torch.backends.cpu.get_cpu_capability(), *_half_flags()])


def _accelerator_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {properties.major}.{properties.minor}"


@cache
def _half_flags() -> tuple[str, ...]:
    """The flags of the CPU's instructions for 16-bit floats."""
    flags = {flag for line in _cpuinfo() if line.startswith("flags") for flag in line.split()}
    return tuple(sorted(flags & _CPU_HALF_SPEEDUP.keys()))


@cache
def _cpuinfo() -> tuple[str, ...]:
    """What Linux tells of the CPU; nothing on other systems."""
    try:
        return tuple(Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
    except OSError:
        return ()
