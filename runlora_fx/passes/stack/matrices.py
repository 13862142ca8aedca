"""Matrices: the operands of products as they lie in memory.

    permute(view(x, [2048, 1024]), [1, 0])      ->      Matrix(the view, turned)

Invariant: two matrices of equal keys hold the same numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import NamedTuple

import torch
from torch import fx

from runlora_fx.passes.levels.sizes import example_of, facts_of

_aten = torch.ops.aten

#: Operators that show the same elements in the same order.
RESHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)

_TURNS = (_aten.permute.default, _aten.transpose.int, _aten.t.default)


class Matrix(NamedTuple):
    """A matrix, or the transpose of one.

    Attributes:
        node: Holds it row by row, without gaps; shape (rows, cols).
        turned: True if the transpose is meant.
    """

    node: fx.Node
    turned: bool

    @property
    def key(self) -> Hashable:
        """The same for equal matrices that lie alike."""
        return (base_of(self.node), tuple(sizes_of(self.node)), self.turned)

    @property
    def size(self) -> int:
        """What it takes in memory [B]."""
        rows, cols = sizes_of(self.node)
        val = example_of(self.node)
        assert val is not None
        return rows * cols * val.itemsize


def sizes_of(node: fx.Node) -> tuple[int, ...]:
    """The sizes of a tensor that has no symbolic ones."""
    facts = facts_of(node)
    assert facts is not None
    return tuple(size for size in facts.shape if isinstance(size, int))


def matrix_of(node: fx.Node) -> Matrix | None:
    """The matrix that a node holds; None if it lies in no such way, or its sizes are symbolic."""
    turned = False
    if node.target in _TURNS and isinstance(node.args[0], fx.Node):
        node, turned = node.args[0], True
    facts = facts_of(node)
    if facts is None or not facts.is_plain or len(facts.shape) != 2:
        return None
    if not all(isinstance(size, int) and size > 0 for size in facts.shape):
        return None
    val = example_of(node)
    assert val is not None
    return Matrix(node, turned) if val.is_contiguous() else None


def base_of(node: fx.Node) -> fx.Node:
    """What a node shows in another shape, and nothing else."""
    *_, last = shown(node)
    return last


def shown(node: fx.Node) -> Iterator[fx.Node]:
    """A node, and what it shows in other shapes, down to what computes the elements."""
    yield node
    while node.target in RESHAPES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        yield node
