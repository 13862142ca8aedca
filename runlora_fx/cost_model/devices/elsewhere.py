"""A device that is not in this machine: graphs are planned for it wherever they are compiled.

    Elsewhere("h100")             plans by what the maker publishes
    Elsewhere("rig/gpu.json")     plans by what ``calibrate --export`` wrote on another machine

Invariant: nothing that this machine measured enters the plan, and nothing is measured for it.
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
    """What is known about a device that is named, or that a file describes.

    Attributes:
        name: The name or the file.
    """

    def __init__(self, name: str) -> None:
        """Look a device up.

        Raises:
            ValueError: If it is neither a known name nor a file of a profile.
        """
        super().__init__(use_stored=False)
        self.name = name
        self._profiles = profiles_of(name)

    def record(self, device: torch.device, dtype: str) -> Record:
        """Nothing: what this machine measured says nothing about another."""
        return Record()

    def profile(self, device: torch.device, dtype: str) -> MachineProfile:
        """The profile of the device that is planned for, wherever the graph is compiled."""
        if dtype not in self._profiles:
            _warn_missing(self.name, dtype)
        return self._profiles.get(dtype) or next(iter(self._profiles.values()))

    def identity(self) -> str:
        """Changes with every number that a plan can depend on."""
        known = [(d, sorted(p.known.items()), p.measured) for d, p in self._profiles.items()]
        return hashlib.sha256(json.dumps([self.name, known]).encode()).hexdigest()


def machine_for(name: str, *, use_stored: bool) -> Machine:
    """The machine that is planned for: this one, unless another device is named."""
    return Elsewhere(name) if name else Machine(use_stored=use_stored)


def export(device: torch.device, path: Path) -> list[str]:
    """Write what is known about a device of this machine into a file.

    Returns:
        The dtypes that the file has: those that were calibrated under the settings of now.

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
    """Warn once: a model has many graphs."""
    _log.warning("runlora: profile %s has no rates for %s; it takes those of another", name, dtype)
