"""Origins: where the tensor of a leaf comes from.

Example: the leaf ``W`` of ``mm(x, w)`` is held by the node ``w``. The column of ones that repeats a
bias is held by no node; emission writes it where a plan needs it.

A new origin, such as a weight that a fused operator dequantises inside, is one class here, and one
call of :meth:`Reading.virtual` in the form that knows of it.

Invariant: two leaves are one if their origins are of one type and have equal keys and sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import fx

from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.levels.sizes import value_of


class LeafWriter(Protocol):
    """What emission offers to an origin that has to write its tensor."""

    def ones(self, rows: Dim) -> fx.Node:
        """A column of ones of shape (rows, 1), in the dtype and on the device of the root."""

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call where the writer stands, or an equal one that stands before it."""


class Origin(Protocol):
    """Where the tensor of a leaf comes from: a node holds it, or it is written when needed."""

    @property
    def node(self) -> fx.Node | None:
        """The node that holds the tensor; None if it has to be written."""

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The nodes that have to exist for the tensor to: its own, or those it is written from."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the tensor; None if it is written in any."""

    def key(self, number_of: Callable[[fx.Node], int]) -> Hashable:
        """What identifies the tensor among the origins of its type.

        Args:
            number_of: The number of a node's value; equal values have equal numbers.
        """

    def write(self, writer: LeafWriter) -> fx.Node:
        """The node that holds the tensor, written where the writer stands if there is none."""


@dataclass(frozen=True)
class Held:
    """A node of the graph holds the tensor."""

    node: fx.Node

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The node."""
        return (self.node,)

    @property
    def dtype(self) -> torch.dtype | None:
        """That of the node."""
        val = value_of(self.node)
        return None if val is None else val.dtype

    def key(self, number_of: Callable[[fx.Node], int]) -> Hashable:
        """The node's value."""
        return number_of(self.node)

    def write(self, writer: LeafWriter) -> fx.Node:
        """The node; nothing is written."""
        return self.node


@dataclass(frozen=True)
class OnesColumn:
    """The column of ones that repeats a row ``rows`` times. No node holds it."""

    rows: Dim

    node: ClassVar[None] = None
    sources: ClassVar[tuple[fx.Node, ...]] = ()
    dtype: ClassVar[None] = None

    def key(self, number_of: Callable[[fx.Node], int]) -> Hashable:
        """The number of rows, which the sizes of the leaf tell already."""
        return ()

    def write(self, writer: LeafWriter) -> fx.Node:
        """A column of ones."""
        return writer.ones(self.rows)
