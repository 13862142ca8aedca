"""Reuse: merged weights kept from call to call, for as long as nothing they are made of changes.

An operator of our own makes the merged weight and remembers it. Autograd's version counters and the
identity of the memory say whether a weight has changed, and any step of a torch optimizer counts as
a change of all: fused ones do not count versions. Edits through ``.data`` do neither, and need
:func:`forget_merged_weights`.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Identity(NamedTuple):
    """Which memory a tensor shows, and in what state."""

    storage: StorageWeakRef
    place: tuple[Any, ...]
    version: int


class _Entry(NamedTuple):
    made_of: tuple[_Identity, ...]
    alpha: float
    optimizer_steps: int
    weight: Tensor


_lock = threading.Lock()
_kept: dict[StorageWeakRef, _Entry] = {}
_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


@torch.library.custom_op("runlora::merged_weight", mutates_args=())
def merged_weight(base: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """``base + alpha * (left @ right)``, the one made before if nothing has changed since.

    The result must not be written to. One is kept for every base, so that switching adapters
    replaces it.
    """
    try:
        made_of = tuple(map(_identity, (base, left, right)))
    except RuntimeError:  # tensors of inference mode count no versions
        return _merge(base, left, right, alpha)
    with _lock:
        steps = _optimizer_steps
        entry = _kept.get(made_of[0].storage)
        if entry is not None and entry[:3] == (made_of, alpha, steps):
            return entry.weight
    result = _merge(base, left, right, alpha)
    with _lock:
        for storage in [storage for storage in _kept if storage.expired()]:  # type: ignore[no-untyped-call]
            del _kept[storage]
        # One for each base: another adapter takes the place of this one.
        _kept[made_of[0].storage] = _Entry(made_of, alpha, steps, result)
    return result


@merged_weight.register_fake
def _(base: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    return torch.addmm(base, left, right, alpha=alpha)


def _merge(base: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    return torch.addmm(base, left, right, alpha=alpha)


def forget_merged_weights() -> int:
    """Drop all merged weights that are kept from call to call (option ``reuse``).

    Needed after weights were edited through ``.data``, which no version counter sees; it also frees
    the memory.

    Returns:
        What was held [B].
    """
    with _lock:
        held = sum(entry.weight.nbytes for entry in _kept.values())
        _kept.clear()
    return held


def _identity(x: Tensor) -> _Identity:
    place = (x.storage_offset(), x.shape, x.stride(), x.dtype)
    storage = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
    return _Identity(storage, place, x._version)
