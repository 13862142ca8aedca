"""Calibration of the machine profile: `python -m runlora_fx calibrate`.

It times products of LoRA layers and sums of matrices, fits the time of one unit of every cost term,
and stores it. Then it shows how well the fit predicts other products::

    (640, 1536) @ (1536, 1536)   nt   71   42431 us   41012 us   -3%
    float32: flops.nn 72 GFLOP/s, ..., launches 2.1 us each; median error 4%.

Invariant: a stored profile was fitted to at least half of the products, and to none that is shown.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from runlora_fx.cli.console import progress, results
from runlora_fx.cost_model import store
from runlora_fx.cost_model.cost import TERMS
from runlora_fx.cost_model.devices.elsewhere import export
from runlora_fx.cost_model.devices.fit import fit
from runlora_fx.cost_model.devices.machine import default_profile, key_of
from runlora_fx.cost_model.devices.measure import (
    add_seconds,
    matmul_seconds,
    pointwise_seconds,
    random_tensor,
    undisturbed,
)
from runlora_fx.cost_model.devices.registry import entry_of, fastest
from runlora_fx.cost_model.ops import Add, GemmShape, Operation
from runlora_fx.cost_model.profile import MachineProfile
from runlora_fx.cost_model.store import Record

#: Sizes of the LoRA layers to fit to, and of others to check the fit on: tokens, width, rank.
_FITTED = ((16, 128, 1024), (256, 1024, 3072), (8, 64))
_CHECKED = ((48, 512), (640, 1536), (16,))

#: The largest product that is measured; larger ones run at the same rate [FLOP].
_MAX_FLOPS = 8e9

#: On an accelerator tokens and widths are larger by the first, and so is the largest product, by
#: the second: small products take little longer there than a launch.
_WIDER, _MORE_FLOPS = 4, 125

#: About how many runs one measurement takes. The first product that takes more than its share of
#: the time is the largest that is measured.
_SHARE = 8

#: How often all products are measured, in turn. The least time of each counts, because other work
#: on the machine only makes a measurement longer.
_ROUNDS = 3

_ADDED = ((256, 256), (1024, 1024), (2048, 4096))

#: Elements of which special functions and random numbers are measured.
_DRAWN = 1 << 22

_log = logging.getLogger("runlora_fx")


def run(
    device: str, dtypes: Sequence[str], precision: str, seconds: float, export_to: Path | None
) -> int:
    """Measure, store, and show how well the profile predicts products that it was not fitted to.

    Args:
        device: The device to measure; the fastest if empty.
        dtypes: The dtypes to measure.
        precision: The setting of ``torch.set_float32_matmul_precision`` that the profile is for.
        seconds: The time after which measuring stops [s].
        export_to: A file for another machine to plan by; none if None.

    Returns:
        The exit status: 0, or 1 if the time was too short or the profile could not be stored.

    Raises:
        ValueError: If the device or the time is not valid.
    """
    if not seconds > 0:  # also true of NaN
        raise ValueError(f"--seconds must be positive, not {seconds}")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return _run(_device(device or fastest().type), dtypes, seconds / len(dtypes), export_to)
    finally:
        torch.set_float32_matmul_precision(before)


def _run(
    device: torch.device, dtypes: Sequence[str], share_s: float, export_to: Path | None
) -> int:
    """Measure, store and show, under the settings of the process."""
    console = results()
    with undisturbed(device), progress() as bar:
        measured = [
            _calibrate(
                device, dtype, share_s, lambda items, what: bar.track(items, description=what)
            )
            for dtype in dtypes
        ]
    for dtype, checked in zip(dtypes, measured, strict=True):
        if checked is None:
            console.print(
                f"{dtype}: nothing stored, the time was too short. Try a larger --seconds."
            )
        elif not store.load(key_of(device, dtype)).seconds_per:
            console.print(f"{dtype}: nothing stored, {store.folder()} cannot be written to.")
            checked.clear()
        else:
            _show(console, device, dtype, checked)
    if any(measured):
        console.print(f"Stored in {store.folder()}.", soft_wrap=True)
    if any(measured) and export_to:
        exported = ", ".join(export(device, export_to))
        console.print(f"Exported {exported} to {export_to}.", soft_wrap=True)
    return 0 if all(measured) else 1


def _device(name: str) -> torch.device:
    """The device of a name, with its index.

    Raises:
        ValueError: If it cannot compute here.
    """
    try:
        device = torch.empty(0, device=name).device
        random_tensor(1, dtype=torch.float32, device=device).tolist()  # meta tensors hold no data
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"--device {name} cannot be used: {error}") from None
    return device


Track = Callable[[Sequence[GemmShape], str], Iterable[GemmShape]]


def _calibrate(
    device: torch.device, dtype: str, budget_s: float, track: Track
) -> dict[GemmShape, float] | None:
    """Measure and store the profile of one dtype; the times of the products to check it on [s]."""
    end = time.monotonic() + budget_s
    kind = getattr(torch, dtype)
    is_host = entry_of(device).is_host
    fitted, checked = (_shapes(grid, is_host=is_host) for grid in (_FITTED, _CHECKED))
    # Small products come first. If they take long already, large ones are left out.
    shapes = sorted([*checked, *fitted], key=lambda shape: shape.m * shape.k * shape.n)
    longest = budget_s / (_SHARE * _ROUNDS * len(shapes))
    too_large: dict[str, float] = {}
    times: dict[GemmShape, float] = {}
    for i in range(_ROUNDS):
        for shape in track(shapes, f"{dtype}, round {i + 1} of {_ROUNDS}"):
            operation = shape.product(kind.itemsize)
            flops = float(operation.cost.flops)
            if time.monotonic() < end and flops < too_large.get(operation.layout, math.inf):
                took = matmul_seconds(shape, kind, device)
                times[shape] = min(took, times.get(shape, took))
                if took > longest:
                    too_large[operation.layout] = flops
    products = {shape: times[shape] for shape in fitted if shape in times}
    if len(products) < len(fitted) / 2:
        return None
    known: dict[Operation, float] = {s.product(kind.itemsize): t for s, t in products.items()}
    for size in _ADDED:
        known[Add(1, *size, 2, kind.itemsize)] = add_seconds(*size, kind, device)
    store.add(key_of(device, dtype), Record({**fit(known), **_pointwise(kind, device)}))
    return {shape: times[shape] for shape in checked if shape in times}


def _pointwise(kind: torch.dtype, device: torch.device) -> dict[str, float]:
    """The times of special functions and random numbers [s]; nothing where none compile."""
    try:
        return pointwise_seconds(_DRAWN, kind, device)
    except Exception as error:  # a compiler raises what it likes
        _log.warning("runlora could not measure pointwise kernels: %s", error)
        return {}


def _shapes(grid: tuple[tuple[int, ...], ...], *, is_host: bool) -> list[GemmShape]:
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


def _show(
    console: Console, device: torch.device, dtype: str, checked: dict[GemmShape, float]
) -> None:
    """The table of predicted against measured times."""
    key = key_of(device, dtype)
    itemsize = getattr(torch, dtype).itemsize
    profile = store.load(key).profile(default_profile(device, dtype))
    table = Table(title=f"{key.device}, {dtype}: products that the profile was not fitted to")
    for column in ("product", "layout", "GFLOP/s", "measured", "predicted", "error"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    errors = []
    for shape, seconds in checked.items():
        operation = shape.product(itemsize)
        predicted = profile.seconds(operation)
        errors.append(abs(predicted / seconds - 1))
        table.add_row(
            f"({shape.m}, {shape.k}) @ ({shape.k}, {shape.n})",
            "".join("t" if turned else "n" for turned in shape[4:]),
            f"{float(operation.cost.flops) / seconds / 1e9:.0f}",
            f"{seconds * 1e6:.0f} us",
            f"{predicted * 1e6:.0f} us",
            f"{predicted / seconds - 1:+.0%}",
        )
    console.print(table)
    console.print(f"{dtype}: {_units(profile)}; median error {median(errors):.0%}.")


def _shown(seconds: float) -> str:
    """A time in a unit that shows its digits."""
    return f"{seconds * 1e6:.1f} us" if seconds > 1e-7 else f"{seconds * 1e9:.3g} ns"


def _units(profile: MachineProfile) -> str:
    """The rate of each cost term, or the time of one unit."""
    shown = {"flops": "FLOP/s", "bytes": "B/s"}
    units = []
    for name, term in TERMS.items():
        seconds = profile.seconds_per[name]
        if term.total in shown and seconds:
            units.append(f"{name} {1 / seconds / 1e9:.3g} G{shown[term.total]}")
        elif term.is_timed:
            units.append(f"{name} {_shown(seconds)} each")
    return ", ".join(units)
