"""Pricing: the objective for each dtype of a graph, from the profile of its device.

Example: a graph on a CPU has matrices in float32 and bfloat16. ``pricing.objective("float32")`` has
the times that a calibration stored for float32. ``pricing.measure(problems)`` adds those of the
products that a better plan could contain.

Invariant: every measurement is stored, and used for everything that is planned after it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache

import torch
from rich.console import Console
from rich.progress import track

from runlora_fx._torch_group import is_in_group
from runlora_fx.cost_model.devices.machine import Machine, settings_of
from runlora_fx.cost_model.devices.measure import (
    matmul_seconds,
    merge_seconds,
    runs_kernels,
    undisturbed,
)
from runlora_fx.cost_model.objective import Objective
from runlora_fx.cost_model.ops import GemmShape, MergeShape, Shape
from runlora_fx.cost_model.profile import DEFAULT_PROFILE, DTYPES, MachineProfile
from runlora_fx.cost_model.store import Record
from runlora_fx.options import Options
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.search.frontiers import candidate_products
from runlora_fx.passes.upcast import Profiles

_log = logging.getLogger("runlora_fx")

#: What ``memory="low"`` may pay for each byte that is not saved [FLOP/B]. ``X A'`` costs 2 in /
#: itemsize FLOP for a byte. So it is recomputed in layers of up to 4096 inputs in 32 bits, and 2048
#: in 16 bits.
_FLOPS_PER_SAVED_BYTE = 2048

#: The least number of products for which a progress bar is shown.
_SHOW_PROGRESS = 8

#: The number of rounds in which all products are measured. The least time of each is used, because
#: other work on the machine only makes a measurement longer.
_ROUNDS = 4

#: The errors of torch if memory is too small, or if the device or the dtype is not supported.
_NOT_MEASURED = (RuntimeError, TypeError, AssertionError)


class Pricing:
    """The objectives for a graph.

    Attributes:
        device: Where the graph runs.
    """

    def __init__(self, options: Options, machine: Machine, device: torch.device) -> None:
        """Prepare prices for a device.

        Args:
            options: The options of the pass.
            machine: The profiles of devices. Measurements are added to it.
            device: Where the graph runs.
        """
        self._options = options
        self._machine = machine
        self.device = device
        self._objectives: dict[str, Objective] = {}

    def objective(self, dtype: str) -> Objective:
        """The objective that ranks plans for matrices of a dtype."""
        if dtype not in self._objectives:
            profile = DEFAULT_PROFILE
            if self._options.objective == "time" and dtype in DTYPES:
                profile = self._machine.profile(self.device, dtype)
            saved = _FLOPS_PER_SAVED_BYTE if self._options.memory == "low" else 0
            self._objectives[dtype] = Objective(
                self._options.objective,
                self._options.margin,
                profile,
                saved,
                self._options.numerics != "strict",
            )
        return self._objectives[dtype]

    @property
    def profiles(self) -> Profiles:
        """What products take, by device and dtype."""
        return self._machine.profile

    @property
    def settings(self) -> str:
        """The settings of the process that times on the device depend on."""
        return settings_of(self.device)

    def record(self, dtype: str) -> Record:
        """The measurements on the device in a dtype."""
        return self._machine.record(self.device, dtype)

    def add(self, dtype: str, newer: Record) -> None:
        """Add measurements to those of the device, and store them."""
        self._machine.add(self.device, dtype, newer)
        self._objectives.pop(dtype, None)

    def measure(self, problems: Iterable[Problem]) -> None:
        """Time the products of all plans that may be the cheapest, if they are not timed yet."""
        wanted: dict[str, dict[Shape, None]] = {}
        for problem in dict.fromkeys(problems):
            if problem.dtype in DTYPES:
                products = candidate_products(problem, self.objective(problem.dtype))
                wanted.setdefault(problem.dtype, {}).update(dict.fromkeys(products))
        for dtype, shapes in wanted.items():
            known, profile = self.record(dtype).products, self.objective(dtype).profile
            missing = [shape for shape in shapes if shape not in known]
            if profile.may_upcast:
                size = getattr(torch, dtype).itemsize
                missing = [s for s in missing if not _upcasts(s, profile, size)]
            if not runs_kernels(self.device, dtype):
                missing = [shape for shape in missing if not isinstance(shape, MergeShape)]
            if not missing:
                continue
            times = self._times(missing, dtype)
            if times:
                self.add(dtype, Record(products=times))

    def _times(self, shapes: list[Shape], dtype: str) -> dict[Shape, float]:
        times: dict[Shape, float] = {}
        failed: set[Shape] = set()
        with undisturbed(self.device):
            for shape in track(
                shapes * _ROUNDS,
                f"runlora measures products in {dtype}",
                console=Console(stderr=True),
                transient=True,
                disable=len(shapes) < _SHOW_PROGRESS,
            ):
                if shape in failed:
                    continue
                try:
                    took = _seconds(shape, getattr(torch, dtype), self.device)
                    times[shape] = min(took, times.get(shape, took))
                except _NOT_MEASURED as error:
                    failed.add(shape)
                    _log.info("runlora could not measure %s in %s: %s", shape, dtype, error)
        return times


def _upcasts(shape: Shape, profile: MachineProfile, itemsize: int) -> bool:
    """True if a shape is that of a product that runs in float32."""
    return isinstance(shape, GemmShape) and profile.upcasts(shape.product(itemsize))


def _seconds(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """The time of a product, or of a merge [s]."""
    if isinstance(shape, MergeShape):
        return merge_seconds(shape, dtype, device)
    return matmul_seconds(shape, dtype, device)


def may_measure() -> bool:
    """True if this process may measure. Ranks of a group may not: they need equal plans."""
    if is_in_group():
        _warn_of_group()
        return False
    return True


@cache
def _warn_of_group() -> None:
    """Warn once: a model may have many graphs."""
    _log.warning(
        "runlora measures nothing in a process group, where all ranks need the same plan; "
        "run `python -m runlora_fx calibrate` or a single process first"
    )
