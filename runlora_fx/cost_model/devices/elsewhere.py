"""Elsewhere: plan for a device that is not in this machine (the option ``device``).

    Elsewhere("h100")             plans by what the maker publishes
    Elsewhere("rig/gpu.json")     plans by what ``calibrate --export`` wrote on another machine

Invariant: plans depend on no measurement of this machine, and nothing is measured for them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cache
from pathlib import Path

import torch

from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices.machine import Machine, default_profile, key_of
from runlora_fx.cost_model.profile import DTYPES, MachineProfile
from runlora_fx.cost_model.published import profiles_of
from runlora_fx.cost_model.store import Record

_log = logging.getLogger("runlora_fx")


class Elsewhere(Machine):
    """The profiles of a device that is named, or that a file describes.

    Attributes:
        name: The name, or the path of the file.
    """

    def __init__(self, name: str) -> None:
        """Look up the profiles of a device.

        Raises:
            ValueError: If the name is neither in the table nor a file of profiles.
        """
        super().__init__(use_stored=False)
        self.name = name
        self._profiles = profiles_of(name)

    def record(self, device: torch.device, dtype: str) -> Record:
        """An empty record, because measurements of this machine do not apply to another."""
        return Record()

    def profile(self, device: torch.device, dtype: str) -> MachineProfile:
        """The profile of the device that is planned for, whatever device the graph is on."""
        if dtype not in self._profiles:
            _warn_missing(self.name, dtype)
        return self._profiles.get(dtype) or next(iter(self._profiles.values()))

    @property
    def upcasts(self) -> bool:
        """False: what runs here is not what was planned for."""
        return False

    def identity(self) -> str:
        """A digest of every number that a plan can depend on."""
        known = [(d, sorted(p.known.items()), p.measured) for d, p in self._profiles.items()]
        return hashlib.sha256(json.dumps([self.name, known]).encode()).hexdigest()


def machine_for(name: str, *, use_stored: bool, upcasts: bool = False) -> Machine:
    """The machine to plan for: this one, or the named device."""
    return Elsewhere(name) if name else Machine(use_stored=use_stored, upcasts=upcasts)


def export(device: torch.device, path: Path) -> list[str]:
    """Write the calibrated profiles of a device of this machine into a file.

    Returns:
        The dtypes in the file: those that were calibrated under the current settings.

    Raises:
        OSError: If the file cannot be written.
    """
    found = {}
    for dtype in DTYPES:
        record = store.load(key_of(device, dtype))
        if record.seconds_per:
            known = {**default_profile(device, dtype).known, **record.seconds_per}
            found[dtype] = Record(known, record.products)
    if found:
        store.write(path, found)
    return list(found)


@cache
def _warn_missing(name: str, dtype: str) -> None:
    """Log a warning once, although a model has many graphs."""
    _log.warning("runlora: profile %s has no rates for %s; it takes those of another", name, dtype)
