"""Stacks of merged expert weights: what PEFT makes of adapters on parameters of experts.

``W + s L R`` of shape (experts, out, in), by one ``baddbmm`` in every forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from runlora_fx.passes.emit.nodes import Inserter
from runlora_fx.passes.levels.sizes import value_of

_aten = torch.ops.aten


class Merged(NamedTuple):
    """``base + alpha * (left @ right)``, a matrix for each expert."""

    base: fx.Node
    left: fx.Node
    right: fx.Node
    alpha: float


class Use(NamedTuple):
    """A batched product with a tensor: which side that is on, and whether it is transposed."""

    product: fx.Node
    other: fx.Node
    is_left: bool
    transposed: bool


@dataclass(frozen=True)
class Mixture:
    """A merged stack of weights (rows, columns) and the tokens that multiply by it.

    Attributes:
        node: The stack.
        experts: Matrices in it.
        rows: Rows of each.
        columns: Columns of each.
        rank: Of the adapter.
        multiplied: Tokens, summed over the products with the stack.
        outer: Tokens, summed over the products that make its gradients.
        reading: Tokens, summed over the gradients of its factors.
        readers: Gradients of its factors.
        border: From how many tokens on merging costs less, where their number is a symbol.
        gathered: Whether tokens pick their weights, for products that are read and planned besides.
        split: Whether the products are split.
    """

    node: fx.Node
    experts: int
    rows: int
    columns: int
    rank: int
    multiplied: int
    outer: int
    reading: int
    readers: int
    border: str = ""
    gathered: bool = False
    split: bool = False

    @property
    def flops_merged(self) -> int:
        """Of all products as they come [FLOP]."""
        merges = self.experts * self.rank * (1 + self.readers)
        return 2 * self.rows * self.columns * (self.multiplied + self.outer + merges)

    @property
    def flops_besides(self) -> tuple[int, int]:
        """FLOPs before and after, of what is not among the products that are read [FLOP]."""
        grouped = 2 * self.rows * self.columns * (self.multiplied + self.outer)
        if not self.split:  # the merges are read
            return (0, 0) if self.gathered else (grouped, grouped)
        before, after = self.flops_merged, self.flops_split
        return (before - after, 0) if self.gathered else (before, after)

    @property
    def flops_split(self) -> int:
        """Of all products with the factors [FLOP]."""
        low = self.rank * (self.rows + self.columns) * (self.multiplied + self.reading)
        return 2 * (self.rows * self.columns * self.multiplied + low)


def possible_stacks(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that may be stacks of merged weights: few, for each is tried in a transaction."""
    return list(graph.find_nodes(op="call_function", target=_aten.baddbmm.default))


def merged_stack(node: fx.Node) -> Merged | None:
    """A node as a stack of merged weights."""
    if node.target is not _aten.baddbmm.default or node.kwargs.get("beta", 1) != 1:
        return None
    args: Any = node.args
    base, left, right = args[:3]
    alpha = node.kwargs.get("alpha", 1)
    nodes = all(isinstance(x, fx.Node) for x in (base, left, right))
    if not nodes or len(node.args) > 3 or not isinstance(alpha, int | float):
        return None
    if sizes(node) is None or sizes(base) != sizes(node) or sizes(left) is None:
        return None
    return Merged(base, left, right, float(alpha))


def sizes(node: Any) -> tuple[int, int, int] | None:
    """The sizes of a floating tensor with three dimensions, none of them symbolic."""
    val = value_of(node)
    if val is None or val.dim() != 3 or not val.dtype.is_floating_point:
        return None
    a, b, c = val.shape
    known = isinstance(a, int) and isinstance(b, int) and isinstance(c, int)
    return (a, b, c) if known else None


def is_transpose(node: fx.Node) -> bool:
    """Whether a node is the transpose of each matrix in a batch."""
    args: Any = node.args
    if node.target is _aten.permute.default:
        return list(args[1]) == [0, 2, 1]
    return node.target is _aten.transpose.int and {d % 3 for d in args[1:]} == {1, 2}


def is_turned(node: fx.Node) -> bool:
    """Whether a node is the transpose of what is left without transposes."""
    return is_transpose(node) and not is_turned(source(node))


def batched_uses(tensor: fx.Node) -> list[Use] | None:
    """The batched products that read a tensor or its transpose; None if anything else does."""
    found = []
    for user in tensor.users:
        if is_transpose(user):
            below = batched_uses(user)
            if below is None:
                return None
            found += [use._replace(transposed=not use.transposed) for use in below]
        elif user.target is _aten.bmm.default and user.args[0] is not user.args[1]:
            sides: Any = user.args
            is_left = sides[0] is tensor
            found.append(Use(user, sides[1 if is_left else 0], is_left, False))
        else:
            return None
    return found


def untransposed(node: fx.Node) -> fx.Node:
    """What a node is the transpose of, or the transpose of the transpose."""
    return untransposed(source(node)) if is_transpose(node) else node


def source(node: fx.Node) -> fx.Node:
    """The first argument of a node."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def transpose(insert: Inserter, node: fx.Node) -> fx.Node:
    """The transpose of each matrix in a batch."""
    return insert(_aten.permute.default, node, [0, 2, 1])
