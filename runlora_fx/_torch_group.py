"""Process groups of torch: what all ranks agree on without a collective.

    agree_in_group("rates", measure)      the first rank measures, the others use what it found

Invariant: without a group nothing is shared, and nobody waits. A fake group counts as none: its
ranks are simulated in one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

from torch import distributed

from runlora_fx import _torch_names as names

#: What comes before what a rank found, and before why it found nothing.
_FOUND, _FAILED = "=", "!"

#: How long a rank waits for what another one measures [s].
_GROUP_WAIT_S = 60


def is_in_group() -> bool:
    """True if this process is one of several ranks."""
    is_group = distributed.is_available() and distributed.is_initialized()
    return is_group and distributed.get_world_size() > 1 and distributed.get_backend() != "fake"


def agree_in_group(name: str, make: Callable[[], str]) -> str:
    """What a function returns, the same on all ranks of a process group: the first rank calls it.

    Without a group the function is called. No collective is used, so ranks need not compile the
    same graphs at the same time.

    Args:
        name: Of what they agree on.
        make: What the first rank calls; if it raises, the others raise too.

    Raises:
        Exception: What ``make`` raises, or what the group's store raises if nobody answers.
        RuntimeError: If ``make`` has failed on another rank.
    """
    if not is_in_group():
        return make()
    from torch.distributed.distributed_c10d import PrefixStore  # not in every build of torch

    # torchrun may hand the store of ranks that are gone to those that it starts again.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = PrefixStore(f"runlora/{attempt}", names._get_default_store())
    if shared.add(f"{name}/claimed", 1) == 1:
        try:
            made = make()
        except Exception as error:
            shared.set(name, f"{_FAILED}{type(error).__name__}: {error}")
            raise
        shared.set(name, f"{_FOUND}{made}")
        return made
    shared.wait([name], timedelta(seconds=_GROUP_WAIT_S))
    found = str(shared.get(name).decode())
    if found.startswith(_FAILED):
        raise RuntimeError(f"another rank failed: {found.removeprefix(_FAILED)}")
    return found.removeprefix(_FOUND)
