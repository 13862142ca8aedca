"""Example results: what a call returns for example tensors, computed once for equal calls.

    mm(fake (64, 8), fake (8, 32)), the second time    ->    a fake (64, 32), made without the call

Models have equal layers, so most calls that a rewrite writes were written before. The key of a call
is its target, its constants, and the shape, strides, offset, dtype and device of its tensors. A
call with symbolic sizes, real tensors or several results is computed every time.

Invariant: a result has the shape, strides, offset, dtype and device that the call would give it,
and shares memory with an argument exactly if the result of the call does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import fx

from runlora_fx._torch_compat import fake_like, in_fake_mode, is_plain_fake, storage_of
from runlora_fx._torch_debug import keeping_symbols


class Layout(NamedTuple):
    """Everything about a tensor but its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class _Known(NamedTuple):
    """The result of an earlier call, and the position of the argument that it is a view of."""

    value: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    view_of: int | None


class ExampleResults:
    """Computes the example values of calls in one fake mode."""

    def __init__(self, mode: Any) -> None:
        """Compute in a fake mode; if it is None, on real tensors."""
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
        except (_NotPlainError, TypeError):  # TypeError: an argument that cannot be hashed
            with keeping_symbols():  # torch 2.11 refuses symbolic sizes in linear() without it
                return self._called(target, args, kwargs)
        if known is not None:
            base = None if known.view_of is None else tensors[known.view_of]
            return fake_like(known.value, known.shape, known.strides, base)
        value = self._called(target, args, kwargs)
        if is_plain_fake(value, self._mode):
            storages = [storage_of(tensor) for tensor in tensors]
            bases = [i for i, storage in enumerate(storages) if storage == storage_of(value)]
            # If two arguments share memory here, those of an equal call need not.
            if len(bases) < 2:
                view_of = bases[0] if bases else None
                self._known[key] = _Known(value, tuple(value.shape), value.stride(), view_of)
        return value

    def _called(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with in_fake_mode(self._mode), torch.no_grad():
            return target(*values_of(args), **values_of(kwargs))

    def _frozen(self, x: Any, tensors: list[torch.Tensor]) -> Hashable:
        """An argument as a part of the key; its tensors are added to a list.

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
    """An argument whose key would not determine the result."""


def layout_of(value: torch.Tensor) -> Layout:
    """The layout of a tensor."""
    offset = int(value.storage_offset())
    return Layout(tuple(value.shape), value.stride(), offset, value.dtype, value.device)


def values_of(x: Any) -> Any:
    """Arguments in which every node is replaced by its example value."""
    return fx.node.map_arg(x, lambda node: node.meta["val"])
