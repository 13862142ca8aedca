"""Devices and profiles: what is in this machine, and whether plans know its own times.

Before -> after: a CPU that was never calibrated -> a warning, and the command that does it.

Invariant: nothing is measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from runlora_fx.cli.doctor.finding import Finding
from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices.machine import key_of
from runlora_fx.cost_model.devices.registry import entry_of, fastest, present
from runlora_fx.cost_model.profile import DTYPES

_DAY_S = 86_400


def check() -> Iterator[Finding]:
    """Every device with its profile; only the fastest has to be calibrated."""
    used = fastest()
    for device in present():
        yield Finding("devices", str(device), "ok", entry_of(device).model(device))
    for device in present():
        keys = {dtype: key_of(device, dtype) for dtype in DTYPES}
        ages = [
            f"{dtype} {_age(key)}" for dtype, key in keys.items() if store.load(key).seconds_per
        ]
        if ages:
            yield Finding("profiles", str(device), "ok", f"calibrated: {', '.join(ages)}")
        elif entry_of(device) is entry_of(used):
            yield Finding(
                *("profiles", str(device), "warning"),
                "not calibrated with this torch and these settings: rates are estimated",
                f"runlora calibrate --device {device.type}",
            )


def _age(key: store.Key) -> str:
    """How long ago a profile was measured."""
    try:
        seconds = time.time() - (store.folder() / key.file_name).stat().st_mtime
    except OSError:
        return "now"
    days = int(seconds // _DAY_S)
    return f"{days} day{'' if days == 1 else 's'} ago" if days else "today"
