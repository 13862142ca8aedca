"""Example results: what a call returns for example tensors, computed once for equal calls.

    mm(fake (64, 8), fake (8, 32)), the second time    ->    a fake (64, 32), made without the call

Layers are alike, so most calls that a rewrite writes have been written before. A call is known by
its target, its plain arguments, and the shape, strides, offset, dtype and device of its tensors.
Whatever is not such a call runs as it is: symbolic sizes, real tensors, several results.

Invariant: a result has the shape, strides, offset, dtype and device that the call would give it,
and shares memory with an argument exactly if the result of the call does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import fx

from runlora_fx._torch_compat import fake_like, in_fake_mode, is_plain_fake, storage_of


class Layout(NamedTuple):
    """What is known of a tensor without its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class _Known(NamedTuple):
    """What a call returned once, and the position of the argument that it is a view of."""

    value: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    view_of: int | None


class ExampleResults:
    """Computes the example values of calls in one fake mode."""

    def __init__(self, mode: Any) -> None:
        """Compute in a fake mode; on real tensors, if it is None."""
        self._mode = mode
        self._known: dict[Hashable, _Known] = {}

    def __call__(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The example value of a call on nodes with example values."""
        tensors: list[torch.Tensor] = []
        try:
            key = (target, self._frozen(args, tensors), self._frozen(kwargs, tensors))
            known = self._known.get(key)
        except (_NotPlainError, TypeError):  # what cannot be hashed is no plain argument either
            return self._called(target, args, kwargs)
        if known is not None:
            base = None if known.view_of is None else tensors[known.view_of]
            return fake_like(known.value, known.shape, known.strides, base)
        value = self._called(target, args, kwargs)
        if is_plain_fake(value, self._mode):
            storages = [storage_of(tensor) for tensor in tensors]
            bases = [i for i, storage in enumerate(storages) if storage == storage_of(value)]
            if len(bases) < 2:  # of two that share memory, the next call may read two that do not
                view_of = bases[0] if bases else None
                self._known[key] = _Known(value, tuple(value.shape), value.stride(), view_of)
        return value

    def _called(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with in_fake_mode(self._mode), torch.no_grad():
            return target(*values_of(args), **values_of(kwargs))

    def _frozen(self, x: Any, tensors: list[torch.Tensor]) -> Hashable:
        """What identifies an argument; adds the tensors in it to a list.

        Raises:
            _NotPlainError: If it holds anything but plain fake tensors and constants.
        """
        if isinstance(x, fx.Node):
            value = x.meta["val"]
            if not is_plain_fake(value, self._mode):
                raise _NotPlainError
            tensors.append(value)
            return layout_of(value)
        if isinstance(x, list | tuple):
            return tuple([self._frozen(y, tensors) for y in x])
        if isinstance(x, dict):
            return tuple([(name, self._frozen(y, tensors)) for name, y in x.items()])
        return (type(x), x)


class _NotPlainError(Exception):
    """An argument of which a call may depend on more than the key says."""


def layout_of(value: torch.Tensor) -> Layout:
    """The layout of a tensor."""
    offset = int(value.storage_offset())
    return Layout(tuple(value.shape), value.stride(), offset, value.dtype, value.device)


def values_of(x: Any) -> Any:
    """Arguments with the nodes' example values in their places."""
    return fx.node.map_arg(x, lambda node: node.meta["val"])
