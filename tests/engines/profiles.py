"""Profiles that differ between ranks on purpose."""

from __future__ import annotations

import torch

from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices.machine import key_of
from runlora_fx.cost_model.store import Record

#: Times of one FLOP and of one byte [s]. By the first it pays to merge, by the second it does not.
PROFILES = ((1e-12, 1e-25), (1e-25, 1e-12))


def store_profile(rank: int) -> None:
    """Store a profile that no other rank has, nor agrees with."""
    flop, byte = PROFILES[rank % len(PROFILES)]
    rates = {
        **dict.fromkeys(("flops.nn", "flops.nt", "flops.tn"), flop),
        **dict.fromkeys(("read", "written", "elementwise"), byte),
        **dict.fromkeys(("launches", "special", "random"), 1e-25),
    }
    store.add(key_of(torch.device("cpu"), "float32"), Record(rates))
