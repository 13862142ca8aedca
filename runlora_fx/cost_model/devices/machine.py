"""Machine: the stored times of this machine's devices, under the settings of this process.

Example: ``key_of(torch.device("cpu"), "float32")`` is the model of the CPU, the dtype, the version
of torch and ``"deterministic=False, fp32_precision=ieee, onednn=True, threads=2"``.

All ranks of a process group plan by the numbers of the rank that comes first, whatever each of them
has stored: with tensor parallelism their graphs have collectives, which must keep one order.

Invariant: every number and setting that can change a plan also changes :meth:`Machine.identity`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cache

import torch

from runlora_fx._torch_group import agree_in_group, is_in_group
from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices import registry
from runlora_fx.cost_model.devices.device import Settings
from runlora_fx.cost_model.profile import DTYPES, MachineProfile
from runlora_fx.cost_model.store import Key, Record

_log = logging.getLogger("runlora_fx")


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


def name_in_group(device: torch.device, dtype: str) -> str:
    """What the ranks of a group call the times of a device.

    Models of devices and numbers of threads may differ between ranks, and are left out.
    """
    settings = key_of(device, dtype).settings.split(", ")
    alike = ", ".join(text for text in settings if not text.startswith("threads="))
    return f"{device.type}/{dtype}/{alike}"


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
        #: The estimated times, where those of another rank are used.
        self._estimates: dict[Key, MachineProfile] = {}

    def record(self, device: torch.device, dtype: str) -> Record:
        """The measured times of a device."""
        key = key_of(device, dtype)
        if key not in self._records:
            known = store.load(key) if self._use_stored else Record()
            if is_in_group():
                known = self._agreed(device, dtype, known)
            if self._use_stored and key in _used:
                known = known.updated(_used[key])
            self._records[key] = known
        return self._records[key]

    def _agreed(self, device: torch.device, dtype: str, own: Record) -> Record:
        """The record by which all ranks of the group plan; this rank's own if that fails."""
        estimated = default_profile(device, dtype)

        def shown() -> str:
            return json.dumps([dict(estimated.known), store.as_text(own)])

        kind = "stored" if self._use_stored else "estimated"
        try:
            shared = agree_in_group(f"{kind}/{name_in_group(device, dtype)}", shown)
            known, text = json.loads(shared)
            agreed = store.from_text(text)
        except Exception as error:  # of the group's store, or of another version's rank
            _warn_of_ranks(f"{type(error).__name__}: {error}")
            return own
        self._estimates[key_of(device, dtype)] = MachineProfile(known)
        return agreed

    def add(self, device: torch.device, dtype: str, newer: Record) -> None:
        """Add measured times of a device to the snapshot, and store them."""
        key = key_of(device, dtype)
        self._records[key] = self.record(device, dtype).updated(newer)
        store.add(key, newer)

    def profile(self, device: torch.device, dtype: str) -> MachineProfile:
        """The profile of a device: calibrated or estimated times, and measured products."""
        record = self.record(device, dtype)
        estimated = self._estimates.get(key_of(device, dtype)) or default_profile(device, dtype)
        known = record.profile(estimated)
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
        known: list[object] = [
            (*key_of(device, dtype), self.record(device, dtype).digest)
            for device in registry.present()
            for dtype in DTYPES
        ]
        known += [(*key, sorted(found.known.items())) for key, found in self._estimates.items()]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def default_profile(device: torch.device, dtype: str) -> MachineProfile:
    """The profile that is estimated from the properties of a device."""
    return registry.entry_of(device).profile(device, dtype)


@cache
def _warn_of_ranks(why: str) -> None:
    """Warn once: a model may have many graphs."""
    _log.warning(
        "runlora: the ranks of this process group could not agree on the times of the machine, so "
        "their plans may differ: %s",
        why,
    )
