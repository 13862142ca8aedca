"""Origins: where the tensor of a leaf comes from.

Example: the node ``w`` holds the leaf ``W`` of ``mm(x, w)``. No node holds the column of ones that
repeats a bias, or the weight that ``gemm_4bit(x, packed, ...)`` dequantises inside. Emission writes
them if a plan needs them, the weight as ``dequantize_4bit(packed, ...)``.

A leaf that no node holds is *virtual*. A form that reads one has a
:class:`~runlora_fx.passes.levels.forms.VirtualOperand`. A new origin is one class here.

Invariant: leaves with equal keys of their origins and equal sizes are one leaf. A tensor has the
same key if a node holds it and if none does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import fx

from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.levels.sizes import example_of


class Numbers(Protocol):
    """Value numbers, as origins need them: equal values have equal numbers."""

    def of(self, node: fx.Node) -> int:
        """The number of a node's value."""

    def of_call(self, target: Callable[..., Any], args: tuple[Any, ...]) -> int:
        """The number of what a call computes, whether or not a node makes it.

        Args:
            target: What is called.
            args: Nodes, constants, and origins that are computed.
        """

    def of_attribute(self, name: str, at: fx.Node) -> int:
        """The number of what an attribute of the graph's module holds where a node reads it."""


class LeafWriter(Protocol):
    """The part of the writer that origins use to write their tensors."""

    def ones(self, rows: Dim) -> fx.Node:
        """A column of ones of shape (rows, 1), in the dtype and on the device of the root."""

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Write a call, or return an equal one that stands before."""

    def attribute(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """Write the ``get_attr`` node of an attribute of the graph's module."""


class Origin(Protocol):
    """Where the tensor of a leaf comes from: a node holds it, or it is written when needed."""

    @property
    def node(self) -> fx.Node | None:
        """The node that holds the tensor; None if it has to be written."""

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The nodes that the tensor depends on: the one that holds it, or those it is made from."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the tensor; None if it can be written in any dtype."""

    @property
    def name(self) -> str:
        """The name of the tensor in formulas."""

    def key(self, numbers: Numbers) -> Hashable:
        """A key that equal tensors share."""

    def write(self, writer: LeafWriter) -> fx.Node:
        """The node that holds the tensor, written if there is none."""


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
        """The dtype of the node."""
        val = example_of(self.node)
        return None if val is None else val.dtype

    @property
    def name(self) -> str:
        """The name of the node."""
        return self.node.name

    def key(self, numbers: Numbers) -> Hashable:
        """The node's value."""
        return numbers.of(self.node)

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
    name: ClassVar[str] = "1"

    def key(self, numbers: Numbers) -> Hashable:
        """The number of rows."""
        return OnesColumn, self.rows

    def write(self, writer: LeafWriter) -> fx.Node:
        """A column of ones."""
        return writer.ones(self.rows)


@dataclass(frozen=True)
class FusedProduct:
    """An operator that multiplies by a matrix M without writing M to memory: ``target(x, *args)``.

    Attributes:
        target: Computes ``x M'`` for ``x`` of any number of rows.
        args: Its arguments behind ``x``.
        bits: Width of a stored element of M [bit].
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    bits: int

    def write(self, writer: LeafWriter, x: fx.Node) -> fx.Node:
        """The product with a matrix."""
        return writer.call(self.target, x, *_with_lists(self.args))


@dataclass(frozen=True)
class Computed:
    """A call of nodes computes the tensor; some node may hold it, or none.

    Attributes:
        target: What is called.
        args: Its arguments: nodes, constants, and other computed tensors.
        dtype: The dtype of the tensor.
        product: An operator that multiplies by the tensor without making it, if there is one. It is
            not a part of the key.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    dtype: torch.dtype
    product: FusedProduct | None = None

    node: ClassVar[None] = None

    @property
    def parts(self) -> tuple[Computed, ...]:
        """The call itself, and the calls among its arguments."""
        below = (x.parts for x in self.args if isinstance(x, Computed))
        return (self, *(part for parts in below for part in parts))

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The nodes among the arguments, also among those of computed arguments."""
        nodes = (x for part in self.parts for x in part.args if isinstance(x, fx.Node))
        return tuple(dict.fromkeys(nodes))

    @property
    def name(self) -> str:
        """The call, as ``dequantize_4bit(primals_2)``."""
        target = getattr(self.target, "overloadpacket", self.target)
        first = next((node.name for node in self.sources), "")
        return f"{getattr(target, '__name__', target)}({first})"

    def key(self, numbers: Numbers) -> Hashable:
        """The number of the call."""
        return numbers.of_call(self.target, self.args)

    def write(self, writer: LeafWriter) -> fx.Node:
        """The call, and what it takes."""
        args = (x.write(writer) if isinstance(x, Computed) else x for x in self.args)
        return writer.call(self.target, *_with_lists(args))


@dataclass(frozen=True)
class Attribute:
    """An attribute of the graph's module, which a call of a module reads.

    Attributes:
        target: Its dotted name.
        reader: The call.
        tensor: The parameter.
    """

    target: str
    reader: fx.Node
    tensor: torch.Tensor = field(compare=False)

    node: ClassVar[None] = None
    sources: ClassVar[tuple[fx.Node, ...]] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameter."""
        return self.tensor.dtype

    @property
    def name(self) -> str:
        """The dotted name."""
        return self.target

    def key(self, numbers: Numbers) -> Hashable:
        """The number of a node that reads the attribute."""
        return numbers.of_attribute(self.target, self.reader)

    def write(self, writer: LeafWriter) -> fx.Node:
        """Write such a node."""
        return writer.attribute(self.target, self.tensor)


def _with_lists(args: Iterable[Any]) -> list[Any]:
    """Arguments as a graph has them: lists of sizes are tuples here, which can be compared."""
    return [list(x) if isinstance(x, tuple) else x for x in args]
