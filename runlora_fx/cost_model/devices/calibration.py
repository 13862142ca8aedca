"""Calibration: measured products and sums of LoRA layers become the time of a unit of each term.

    calibrated(device, "float32", 30.0)     a profile, and times to check it on: tens of seconds
    rates(device, "float32", 2.5)           only what every plan depends on: seconds

Invariant: a profile is fitted to at least half of the products that were asked for, and to none
that it is checked on.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from statistics import median
from typing import NamedTuple, TypeAlias

import torch

from runlora_fx.cost_model.cost import Cost
from runlora_fx.cost_model.devices.fit import fit
from runlora_fx.cost_model.devices.measure import (
    add_seconds,
    matmul_seconds,
    pointwise_seconds,
    upcast_seconds,
)
from runlora_fx.cost_model.devices.registry import entry_of
from runlora_fx.cost_model.ops import Add, GemmShape, Operation, UpcastMatMul
from runlora_fx.cost_model.profile import FREE, MachineProfile

#: Sizes of LoRA layers: tokens, width, rank.
Grid: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

#: The layers to fit to, others to check the fit on, and those that a quick fit needs.
_FITTED: Grid = ((16, 128, 1024), (256, 1024, 3072), (8, 64))
_CHECKED: Grid = ((48, 512), (640, 1536), (16,))
_QUICK: Grid = ((16, 512), (1024,), (16,))

#: On an accelerator tokens and widths are larger by the first, and so is the largest product, by
#: the second: small products take little longer there than a launch.
_WIDER, _MORE_FLOPS = 4, 125

#: The largest product that is measured; larger ones run at the same rate [FLOP].
_MAX_FLOPS = 8e9

#: About how many runs one measurement takes. The first product that takes more than its share of
#: the time is the largest that is measured.
_SHARE, _QUICK_SHARE = 8, 4

#: The largest median error of a quick fit that is used. A busy machine exceeds it.
_QUICK_ERROR = 0.3

#: How often all products are measured, in turn. The least time of each counts, because other work
#: on the machine only makes a measurement longer.
_ROUNDS, _QUICK_ROUNDS = 3, 2

_ADDED = ((256, 256), (1024, 1024), (2048, 4096))

#: How many of the largest products are measured in float32.
_UPCAST = 5

#: Elements of which special functions and random numbers are measured.
_DRAWN = 1 << 22

_log = logging.getLogger("runlora_fx")

Track = Callable[[Sequence[GemmShape], str], Iterable[GemmShape]]


def _untracked(shapes: Sequence[GemmShape], what: str) -> Iterable[GemmShape]:
    return shapes


class Calibration(NamedTuple):
    """What was measured of one dtype.

    Attributes:
        seconds_per: By term, the time of one unit [s].
        checked: Times of products that the profile was not fitted to [s].
    """

    seconds_per: dict[str, float]
    checked: dict[GemmShape, float]


def calibrated(
    device: torch.device, dtype: str, budget_s: float, track: Track = _untracked
) -> Calibration | None:
    """Measure a device in one dtype, pointwise kernels included; Inductor compiles those.

    Args:
        device: The device to measure.
        dtype: The dtype of the elements.
        budget_s: The time after which measuring stops [s].
        track: Is given the products of each round, and what they are; it returns them.

    Returns:
        What was found; None if the time was too short.

    Raises:
        RuntimeError: If the device lacks the memory.
    """
    kind = getattr(torch, dtype)
    is_host = entry_of(device).is_host
    fitted, checked = (_shapes(grid, is_host=is_host) for grid in (_FITTED, _CHECKED))
    shapes = [*checked, *fitted]
    longest = budget_s / (_SHARE * _ROUNDS * len(shapes))
    times = _times(device, dtype, shapes, budget_s, _ROUNDS, longest, track)
    found = _fit(device, kind, fitted, times)
    if found is None:
        return None
    shown = {shape: times[shape] for shape in checked if shape in times}
    return Calibration({**found, **_pointwise(kind, device)}, shown)


def rates(device: torch.device, dtype: str, budget_s: float) -> dict[str, float] | None:
    """Measure what the time of every product depends on, and compile nothing.

    Args:
        device: The device to measure.
        dtype: The dtype of the elements.
        budget_s: The time after which measuring stops [s].

    Returns:
        By term of products and sums, the time of one unit [s]; None if the time was too short, or
        if the fit does not predict what was measured, as on a busy machine.

    Raises:
        RuntimeError: If the device lacks the memory.
    """
    kind = getattr(torch, dtype)
    shapes = _shapes(_QUICK, is_host=entry_of(device).is_host)
    longest = budget_s / (_QUICK_SHARE * _QUICK_ROUNDS * len(shapes))
    times = _times(device, dtype, shapes, budget_s, _QUICK_ROUNDS, longest, _untracked)
    found = _fit(device, kind, shapes, times)
    if found is None:
        return None
    profile = MachineProfile(found).as_they_are
    errors = [
        abs(profile.seconds(shape.product(kind.itemsize)) / took - 1)
        for shape, took in times.items()
    ]
    return found if median(errors) <= _QUICK_ERROR else None


def _times(
    device: torch.device,
    dtype: str,
    shapes: Iterable[GemmShape],
    budget_s: float,
    rounds: int,
    longest: float,
    track: Track,
) -> dict[GemmShape, float]:
    """The least times of products [s]; those that the time does not allow are left out."""
    end = time.monotonic() + budget_s
    kind = getattr(torch, dtype)
    # Small products come first. If they take long already, large ones are left out.
    ordered = sorted(shapes, key=lambda shape: shape.m * shape.k * shape.n)
    too_large: dict[str, float] = {}
    times: dict[GemmShape, float] = {}
    for i in range(rounds):
        for shape in track(ordered, f"{dtype}, round {i + 1} of {rounds}"):
            operation = shape.product(kind.itemsize)
            flops = float(operation.cost.flops)
            if time.monotonic() < end and flops < too_large.get(operation.layout, math.inf):
                took = matmul_seconds(shape, kind, device)
                times[shape] = min(took, times.get(shape, took))
                if took > longest:
                    too_large[operation.layout] = flops
    return times


def _fit(
    device: torch.device,
    kind: torch.dtype,
    shapes: Sequence[GemmShape],
    times: dict[GemmShape, float],
) -> dict[str, float] | None:
    """The times of units that predict products and sums; None if too few were measured."""
    products = {shape: times[shape] for shape in shapes if shape in times}
    if len(products) < len(shapes) / 2:
        return None
    known: dict[Operation, float] = {s.product(kind.itemsize): t for s, t in products.items()}
    for size in _ADDED:
        known[Add(1, *size, 2, kind.itemsize)] = add_seconds(*size, kind, device)
    found = fit(known)
    if entry_of(device).may_upcast and kind.itemsize == 2:
        found["flops.upcast"] = _upcast(device, kind, shapes, MachineProfile(found))
    return found


def _upcast(
    device: torch.device, kind: torch.dtype, shapes: Sequence[GemmShape], known: MachineProfile
) -> float:
    """The time of a FLOP of a product that runs in float32, apart from that of its casts [s].

    It is the median over large products. It is not fitted together with other terms, because casts
    of small products take longer than the bytes that they move.
    """
    by_flops = sorted(shapes, key=lambda shape: shape.m * shape.k * shape.n)
    found = []
    for shape in by_flops[-_UPCAST:]:
        cost = UpcastMatMul(shape.product(kind.itemsize)).cost
        casts = Cost({name: amount for name, amount in cost.items() if name != "flops.upcast"})
        took = upcast_seconds(shape, kind, device) - known.of(casts)
        found.append(took / float(cost.flops))
    return max(median(found), FREE)


def _pointwise(kind: torch.dtype, device: torch.device) -> dict[str, float]:
    """The times of special functions, random numbers and picks [s]; nothing where none compile."""
    try:
        return pointwise_seconds(_DRAWN, kind, device)
    except Exception as error:  # a compiler raises what it likes
        _log.warning("runlora could not measure pointwise kernels: %s", error)
        return {}


def _shapes(grid: Grid, *, is_host: bool) -> list[GemmShape]:
    """The products of the layers of a grid of sizes, without those that are too large."""
    wider, most = (1, _MAX_FLOPS) if is_host else (_WIDER, _MAX_FLOPS * _MORE_FLOPS)
    found = (
        shape.canonical
        for tokens, width, rank in product(*grid)
        for shape in _layer(tokens * wider, width * wider, rank)
        if shape.product(1).cost.flops <= most
    )
    return list(dict.fromkeys(found))


def _layer(n: int, w: int, r: int) -> Iterator[GemmShape]:
    """The products of a LoRA layer and its gradients, in all orders of evaluation."""
    for inner, columns in ((w, w), (w, r), (r, w)):
        yield GemmShape(1, n, inner, columns, False, True)  # X W', X A', (X A') B'
        yield GemmShape(1, n, inner, columns, False, False)  # dY W, dY B, (dY B) A
        yield GemmShape(1, columns, n, inner, True, False)  # dY' X, dB, dA
    yield GemmShape(1, w, r, w, False, False)  # B A
