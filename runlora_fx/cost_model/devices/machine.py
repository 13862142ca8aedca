"""Machine: the stored times of this machine's devices, under the settings of this process.

Example: ``key_of(torch.device("cpu"), "float32")`` is the model of the CPU, the dtype, the version
of torch and ``"deterministic=False, fp32_precision=ieee, onednn=True, threads=2"``.

Invariant: every number and setting that can change a plan also changes :meth:`Machine.identity`.
"""

from __future__ import annotations

import hashlib
import json

import torch

from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices import registry
from runlora_fx.cost_model.devices.device import Settings
from runlora_fx.cost_model.profile import DTYPES, MachineProfile
from runlora_fx.cost_model.store import Key, Record


def key_of(device: torch.device, dtype: str) -> Key:
    """The key of times that are measured on a device now."""
    entry = registry.entry_of(device)
    return Key(
        device=entry.model(device),
        dtype=dtype,
        torch=torch.__version__,
        settings=_text(entry.settings(dtype)),
    )


def settings_of(device: torch.device) -> str:
    """The settings that times on a device depend on, for all dtypes together."""
    entry = registry.entry_of(device)
    return _text({name: x for dtype in DTYPES for name, x in entry.settings(dtype).items()})


def _text(settings: Settings) -> str:
    """Settings as text, with the one that concerns every device."""
    every = {"deterministic": torch.are_deterministic_algorithms_enabled(), **settings}
    return ", ".join(f"{name}={every[name]}" for name in sorted(every))


#: What this process uses instead of what is stored.
_used: dict[Key, Record] = {}


def use(key: Key, record: Record) -> None:
    """Use a record instead of the stored one, in this process, from the next snapshot on."""
    _used[key] = record


class Machine:
    """A snapshot of the stored times, so that one compilation plans by one state of them."""

    def __init__(self, *, use_stored: bool, upcasts: bool = False) -> None:
        """Start empty. Records are loaded when they are first asked for.

        Args:
            use_stored: True to use times that were measured before.
            upcasts: True if products of 16-bit matrices will run in float32 where that is faster.
        """
        self._use_stored = use_stored
        self._upcasts = upcasts
        self._records: dict[Key, Record] = {}

    def record(self, device: torch.device, dtype: str) -> Record:
        """The measured times of a device."""
        key = key_of(device, dtype)
        if key not in self._records:
            known = store.load(key) if self._use_stored else Record()
            if self._use_stored and key in _used:
                known = known.updated(_used[key])
            self._records[key] = known
        return self._records[key]

    def add(self, device: torch.device, dtype: str, newer: Record) -> None:
        """Add measured times of a device to the snapshot, and store them."""
        key = key_of(device, dtype)
        self._records[key] = self.record(device, dtype).updated(newer)
        store.add(key, newer)

    def profile(self, device: torch.device, dtype: str) -> MachineProfile:
        """The profile of a device: calibrated or estimated times, and measured products."""
        known = self.record(device, dtype).profile(default_profile(device, dtype))
        return known if self._upcasts else known.as_they_are

    @property
    def upcasts(self) -> bool:
        """True if products of 16-bit matrices on a device here are to run in float32."""
        return any(
            self.profile(device, dtype).may_upcast
            for device in registry.present()
            for dtype in ("bfloat16", "float16")
        )

    def identity(self) -> str:
        """A digest of every number and setting that a plan can depend on."""
        known = [
            (*key_of(device, dtype), self.record(device, dtype).digest)
            for device in registry.present()
            for dtype in DTYPES
        ]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def default_profile(device: torch.device, dtype: str) -> MachineProfile:
    """The profile that is estimated from the properties of a device."""
    return registry.entry_of(device).profile(device, dtype)
