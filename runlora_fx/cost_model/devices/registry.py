"""Registry: all kinds of devices, and the device that a graph computes on.

A kind is a module of this folder with an object ``DEVICE``. :mod:`unknown` stands for all others::

    entry_of(torch.device("mps"))   ->  mps.DEVICE
    entry_of(torch.device("npu"))   ->  unknown.DEVICE

A graph of fake tensors may be on a device that is not in this machine. Then :mod:`unknown` stands
for it too: the graph is planned by the default profile, and nothing is measured.

Invariant: no other module chooses a kind by ``device.type``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from types import MappingProxyType

import torch

from runlora_fx.cost_model import devices
from runlora_fx.cost_model.devices.device import Device
from runlora_fx.cost_model.devices.unknown import DEVICE as UNKNOWN

CPU = torch.device("cpu")


@cache
def entries() -> MappingProxyType[str, Device]:
    """All kinds by type, without ``unknown``."""
    names = sorted(module.name for module in pkgutil.iter_modules(devices.__path__))
    modules = (import_module(f"{devices.__name__}.{name}") for name in names)
    found = (getattr(module, "DEVICE", None) for module in modules)
    return MappingProxyType({d.type: d for d in found if d is not None and d is not UNKNOWN})


def kind_of(device: torch.device) -> Device:
    """The kind of a device, whether or not one is in this machine; ``unknown`` without a file."""
    return entries().get(device.type, UNKNOWN)


def entry_of(device: torch.device) -> Device:
    """The kind of a device; ``unknown`` if it has no file, or if none is in this machine."""
    kind = kind_of(device)
    return kind if kind.present() else UNKNOWN


def present() -> list[torch.device]:
    """All devices of this machine, the CPU first."""
    kinds = sorted(entries().values(), key=lambda kind: not kind.is_host)
    known = [device for kind in kinds for device in kind.present()]
    return known + [device for device in UNKNOWN.present() if device.type not in entries()]


def computing(candidates: Iterable[torch.device]) -> torch.device:
    """The device that computes, of those that a graph's tensors are on: not the CPU, if any."""
    others = (d for d in candidates if not entry_of(d).is_host and d.type != "meta")
    return next(others, CPU)


def fastest() -> torch.device:
    """The first accelerator of this machine; the CPU if there is none."""
    return computing(present())
