"""What the package has to know of one kind of device.

Every kind is one file of this folder with one object called ``DEVICE``
(:mod:`runlora_fx.cost_model.devices.registry` finds it)::

    torch.device("cuda", 0)  ->  model:    "NVIDIA H100 80GB HBM3 9.0, 132 multiprocessors"
                                 settings: {"deterministic": False, "blas": "Cublas", ...}
                                 profile:  seconds per FLOP, per byte, per launch

Invariant: two measurements of one product may be compared only if the model and the settings are
equal. So whatever changes the time of a product is in the model or in the settings.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch

from runlora_fx.cost_model.profile import MachineProfile

#: Settings by name. They are compared as text.
Settings: TypeAlias = Mapping[str, object]


class Device(ABC):
    """One kind of device.

    Attributes:
        type: How torch calls it, such as ``"cuda"``.
        is_host: Whether it is where Python runs. A graph with tensors on the host and on another
            device computes on the other one.
    """

    type: str
    is_host: bool = False

    @abstractmethod
    def present(self) -> list[torch.device]:
        """All devices of this kind in this machine."""

    @abstractmethod
    def model(self, device: torch.device) -> str:
        """What the device is called: equal for devices that are equally fast."""

    @abstractmethod
    def settings(self, dtype: str) -> Settings:
        """The settings of this process that change the times of products.

        Args:
            dtype: Of the elements. A setting that concerns other dtypes only is left out, so that
                it does not make measurements useless that it does not touch.
        """

    @abstractmethod
    def profile(self, device: torch.device, dtype: str) -> MachineProfile:
        """What the device can be expected to do, by its properties; no measurement."""

    @abstractmethod
    def synchronise(self, device: torch.device) -> None:
        """Wait until the device has done all that it was told to do."""

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A new generator of random numbers; None if the device has none."""
        try:
            return torch.Generator(device)
        except RuntimeError:
            return None


def environment(names: Iterable[str]) -> dict[str, str]:
    """The environment variables of some names that are set."""
    return {name: os.environ[name] for name in names if name in os.environ}


def fp32_precision(backend: Any) -> str:
    """How a backend may round 32-bit operands of a product: ``"ieee"`` is not at all.

    Args:
        backend: A part of ``torch.backends``. Its own attribute is read, for
            ``torch.get_float32_matmul_precision`` raises where backends differ.
    """
    found = str(backend.fp32_precision)
    return "ieee" if found == "none" else found
