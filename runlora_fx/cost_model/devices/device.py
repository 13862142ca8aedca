"""Device: the interface of one kind of device.

Every kind is one file of this folder with one object called ``DEVICE``
(:mod:`runlora_fx.cost_model.devices.registry` finds it)::

    torch.device("cuda", 0)  ->  model:    "NVIDIA H100 80GB HBM3 9.0, 132 multiprocessors"
                                 settings: {"deterministic": False, "blas": "Cublas", ...}
                                 profile:  seconds per FLOP, per byte, per launch

Invariant: everything that changes the time of a product is in the model or in the settings.
Measured times of equal models and settings may be compared, and no others.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch

from runlora_fx.cost_model.profile import MachineProfile

#: Settings by name. Their texts are compared.
Settings: TypeAlias = Mapping[str, object]


class Device(ABC):
    """One kind of device.

    Attributes:
        type: Its type in torch, such as ``"cuda"``.
        is_host: True for the CPU, which runs Python. A graph with tensors on the host and on
            another device computes on the other one.
        may_upcast: True if products of 16-bit matrices may be faster in float32.
        draws_in_fours: True if Inductor's one-dimensional kernels draw four random numbers at a
            time, from some version of torch on.
    """

    type: str
    is_host: bool = False
    may_upcast: bool = False
    draws_in_fours: bool = False

    @abstractmethod
    def present(self) -> list[torch.device]:
        """All devices of this kind in this machine."""

    @abstractmethod
    def model(self, device: torch.device) -> str:
        """The name of the model: equal for devices that are equally fast."""

    @abstractmethod
    def settings(self, dtype: str) -> Settings:
        """The settings of this process that change the times of products.

        Args:
            dtype: The dtype of the elements. Settings that concern other dtypes only are left out,
                so that changing one does not invalidate times that do not depend on it.
        """

    @abstractmethod
    def profile(self, device: torch.device, dtype: str) -> MachineProfile:
        """A profile that is estimated from the properties of the device, without measuring."""

    @abstractmethod
    def synchronise(self, device: torch.device) -> None:
        """Wait until the device has finished all work that was submitted to it."""

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A new generator of random numbers; None if the device has none."""
        try:
            return torch.Generator(device)
        except RuntimeError:
            return None


def environment(names: Iterable[str]) -> dict[str, str]:
    """Those of some environment variables that are set."""
    return {name: os.environ[name] for name in names if name in os.environ}


def fp32_precision(backend: Any) -> str:
    """How a backend may round 32-bit operands of a product; ``"ieee"`` means not at all.

    Args:
        backend: A part of ``torch.backends``. Its own attribute is read, because
            ``torch.get_float32_matmul_precision`` raises if backends differ.
    """
    found = str(backend.fp32_precision)
    return "ieee" if found == "none" else found
