"""Published devices: rates from data sheets, to plan for a device that is not in this machine.

    profiles_of("h100")["bfloat16"]  ->  594 TFLOP/s, 2.7 TB/s, 4 us a launch

A plan is priced by a share of the published peaks: :data:`REACHED_FLOPS` and
:data:`REACHED_BANDWIDTH`.

Invariant: every number of the table is a published peak of dense products, and its source stands
beside it. None of them was measured by us.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runlora_fx.cost_model import store
from runlora_fx.cost_model.profile import DEFAULT_PROFILE, DTYPES, FREE, MachineProfile

#: The share of the peak rate that products are assumed to reach.
REACHED_FLOPS = 0.6

#: The share of the peak bandwidth that kernels are assumed to reach.
REACHED_BANDWIDTH = 0.8

#: The time from one kernel in a queue to the next [s].
LAUNCH_S = 4e-6

#: The time of an exp and of a random number on a GPU, in FLOP at the peak rate of single precision.
#: A unit that does 256 FLOP a cycle does 16 exps or 64 integer operations (throughput tables of
#: NVIDIA's programming guide). Ten rounds of Philox are 40 integer operations. Nothing was
#: measured.
_GPU_SPECIAL, _GPU_RANDOM = 16, 160

#: The same on a CPU. Inductor's kernels took 0.25 ns and 7.5 ns on one core with AVX-512 that does
#: 128 GFLOP/s.
_CPU_SPECIAL, _CPU_RANDOM = 32, 960

_TERA = 1e12


@dataclass(frozen=True)
class PublishedDevice:
    """The peaks of one device.

    Attributes:
        title: The device and its variant.
        bandwidth: Peak bandwidth of its memory [B/s].
        half: Dense products in bfloat16 and float16, accumulated in float32 [FLOP/s].
        single: Dense products in float32 without TF32 [FLOP/s].
        double: Dense products in float64 [FLOP/s].
        source: Where the numbers are published.
        is_cpu: True if it is a CPU.
    """

    title: str
    bandwidth: float
    half: float
    single: float
    double: float
    source: str
    is_cpu: bool = False

    def peak(self, dtype: str) -> float:
        """The rate of products in a dtype [FLOP/s]."""
        return {"float32": self.single, "float64": self.double}.get(dtype, self.half)

    def profile(self, dtype: str) -> MachineProfile:
        """The profile for a dtype: shares of the peaks."""
        return MachineProfile(
            {
                "flops.nn": 1 / (self.peak(dtype) * REACHED_FLOPS),
                "read": 1 / (self.bandwidth * REACHED_BANDWIDTH),
                "launches": LAUNCH_S,
                **pointwise_times(self.single, is_cpu=self.is_cpu),
            }
        )


def pointwise_times(single: float, *, is_cpu: bool = False) -> dict[str, float]:
    """The times of a special function and of a random number, without the bytes they move [s].

    On a CPU also that of a picked byte: none, because Inductor fuses the pick into the product.

    Args:
        single: The device's peak in single precision [FLOP/s].
        is_cpu: True if it is a CPU.
    """
    special, random = (_CPU_SPECIAL, _CPU_RANDOM) if is_cpu else (_GPU_SPECIAL, _GPU_RANDOM)
    times = {"special": special / single, "random": random / single}
    return {**times, "picked": FREE} if is_cpu else times


def _of(
    title: str,
    bandwidth: float,
    half: float,
    single: float,
    double: float,
    source: str,
    *,
    is_cpu: bool = False,
) -> PublishedDevice:
    """A device from TB/s and TFLOP/s."""
    rates = (bandwidth * _TERA, half * _TERA, single * _TERA, double * _TERA)
    return PublishedDevice(title, *rates, source, is_cpu)


#: By the name that the option ``device`` takes.
PUBLISHED: Mapping[str, PublishedDevice] = {
    "h100": _of("H100 SXM5 80 GB", 3.35, 989.4, 66.9, 66.9, "NVIDIA H100 datasheet"),
    "h200": _of("H200 SXM 141 GB", 4.8, 989.4, 66.9, 66.9, "NVIDIA H200 datasheet"),
    "a100": _of("A100 SXM4 80 GB", 2.039, 312.0, 19.5, 19.5, "NVIDIA A100 datasheet"),
    "l4": _of("L4 24 GB", 0.3, 121.0, 30.3, 0.49, "NVIDIA L4 datasheet"),
    "rtx4090": _of("RTX 4090 24 GB", 1.008, 165.2, 82.6, 1.29, "NVIDIA Ada whitepaper"),
    "mi300x": _of("MI300X 192 GB", 5.3, 1307.4, 163.4, 163.4, "AMD MI300X datasheet"),
    "xeon8480": _of(
        "Xeon Platinum 8480+, 56 cores",
        0.3072,
        229.4,
        7.17,
        3.58,
        "Intel ARK: 8 x DDR5-4800; AMX 2048 and AVX-512 64 FLOP a cycle at 2.0 GHz",
        is_cpu=True,
    ),
}


def title_of(name: str) -> str:
    """The name of a device in reports, with the source of its rates; "" if no device is named."""
    known = PUBLISHED.get(name)
    if known is None:
        return name and f"the device of {name}"
    return f"{known.title} (rates of the {known.source})"


def profiles_of(name: str) -> Mapping[str, MachineProfile]:
    """The profiles of a device by dtype.

    Args:
        name: A name of :data:`PUBLISHED`, or a file that ``calibrate --export`` wrote.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(name, str) and name in PUBLISHED:
        return {dtype: PUBLISHED[name].profile(dtype) for dtype in DTYPES}
    if not isinstance(name, str) or not Path(name).is_file():
        valid = ", ".join(map(repr, PUBLISHED))
        raise ValueError(
            f"must be one of {valid}, or a file that `python -m runlora_fx calibrate --export` "
            f"wrote, not {name!r}"
        )
    return {dtype: record.profile(DEFAULT_PROFILE) for dtype, record in store.read(name).items()}
