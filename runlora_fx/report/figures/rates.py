"""Rates: what plans were ranked by, for the report.

    the profile of an H100, bfloat16    ->    Rates("H100 SXM5 80 GB ...", "bfloat16", 5.9e14, ...)

Invariant: every rate says if it was published, estimated or measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from runlora_fx.cost_model.devices.machine import key_of
from runlora_fx.cost_model.profile import MachineProfile
from runlora_fx.cost_model.published import (
    PUBLISHED,
    REACHED_BANDWIDTH,
    REACHED_FLOPS,
    title_of,
)
from runlora_fx.passes.context import Context
from runlora_fx.report.figures.figures import Rates


def rates_of(context: Context, profiles: Mapping[str, MachineProfile]) -> tuple[Rates, ...]:
    """The rates that plans were ranked by; none for a profile by which FLOPs or bytes are free.

    Args:
        context: What was planned.
        profiles: By dtype, the profile.
    """
    found = []
    for dtype, profile in profiles.items():
        per_byte = min(profile.seconds_per[name] for name in ("read", "written"))
        if profile.seconds_per_flop > 0 and per_byte > 0:
            device, source = _named(context, dtype)
            found.append(Rates(device, dtype, 1 / profile.seconds_per_flop, 1 / per_byte, source))
    return tuple(found)


def _named(context: Context, dtype: str) -> tuple[str, str]:
    """The device that was planned for, and where its rates come from."""
    name = context.options.device
    if name in PUBLISHED:
        shares = f"{REACHED_FLOPS:.0%} of the FLOP/s and {REACHED_BANDWIDTH:.0%} of the bandwidth"
        return title_of(name), f"assumed: {shares} that the maker publishes"
    if name:
        return title_of(name), "read from the file"
    is_measured = bool(context.machine.record(context.device, dtype).seconds_per)
    source = "measured by calibrate" if is_measured else "estimated from the device's properties"
    return key_of(context.device, dtype).device, source
