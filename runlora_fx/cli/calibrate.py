"""Calibration of the machine profile: `python -m runlora_fx calibrate`.

It times products of LoRA layers and sums of matrices, fits the time of one unit of every cost term,
and stores it. Then it shows how well the fit predicts other products::

    (640, 1536) @ (1536, 1536)   nt   71   42431 us   41012 us   -3%
    float32: flops.nn 72 GFLOP/s, ..., launches 2.1 us each; median error 4%.

Invariant: a stored profile was fitted to at least half of the products, and to none that is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from runlora_fx.cli.console import progress, results
from runlora_fx.cost_model import store
from runlora_fx.cost_model.cost import TERMS
from runlora_fx.cost_model.devices.calibration import Track, calibrated
from runlora_fx.cost_model.devices.elsewhere import export
from runlora_fx.cost_model.devices.machine import default_profile, key_of
from runlora_fx.cost_model.devices.measure import random_tensor, undisturbed
from runlora_fx.cost_model.devices.registry import fastest
from runlora_fx.cost_model.ops import GemmShape
from runlora_fx.cost_model.profile import MachineProfile
from runlora_fx.cost_model.store import Record


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


def _calibrate(
    device: torch.device, dtype: str, budget_s: float, track: Track
) -> dict[GemmShape, float] | None:
    """Measure and store the profile of one dtype; the times of the products to check it on [s]."""
    found = calibrated(device, dtype, budget_s, track)
    if found is None:
        return None
    store.add(key_of(device, dtype), Record(found.seconds_per))
    return found.checked


def _show(
    console: Console, device: torch.device, dtype: str, checked: dict[GemmShape, float]
) -> None:
    """The table of predicted against measured times."""
    key = key_of(device, dtype)
    itemsize = getattr(torch, dtype).itemsize
    stored = store.load(key).profile(default_profile(device, dtype))
    profile, upcast = stored.as_they_are, 0
    table = Table(title=f"{key.device}, {dtype}: products that the profile was not fitted to")
    for column in ("product", "layout", "GFLOP/s", "measured", "predicted", "error"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    errors = []
    for shape, seconds in checked.items():
        operation = shape.product(itemsize)
        predicted = profile.seconds(operation)
        upcast += stored.upcasts(operation)
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
    console.print(f"{dtype}: {_units(stored)}; median error {median(errors):.0%}.")
    if stored.may_upcast:
        console.print(f"{upcast} of these {len(checked)} products are faster in float32.")


def _shown(seconds: float) -> str:
    """A time in a unit that shows its digits."""
    return f"{seconds * 1e6:.1f} us" if seconds > 1e-7 else f"{seconds * 1e9:.3g} ns"


def _units(profile: MachineProfile) -> str:
    """The rate of each cost term, or the time of one unit."""
    shown = {"flops": "FLOP/s", "bytes": "B/s"}
    units = []
    for name, term in TERMS.items():
        seconds = profile.known.get(name, profile.seconds_per[name])
        if name == "flops.upcast" and not profile.may_upcast:
            continue
        if term.total in shown and seconds:
            units.append(f"{name} {1 / seconds / 1e9:.3g} G{shown[term.total]}")
        elif term.is_timed:
            units.append(f"{name} {_shown(seconds)} each")
    return ", ".join(units)
