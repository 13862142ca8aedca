"""Matrices: the operands of products as they lie in memory.

    permute(view(x, [2048, 1024]), [1, 0])      ->      Matrix(the view, turned)

Invariant: two matrices of equal keys hold the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.levels.operators import RESHAPES
from runlora_fx.passes.levels.sizes import example_of, facts_of, shape_of, strides_of

_aten = torch.ops.aten


class Matrix(NamedTuple):
    """A matrix, or the transpose of one.

    Attributes:
        node: Holds it row by row, without gaps; shape (rows, cols).
        turned: True if the transpose is meant.
        size: What it takes in memory; symbolic sizes are those of tracing [B].
    """

    node: fx.Node
    turned: bool
    size: int

    @property
    def key(self) -> Hashable:
        """The same for equal matrices that lie alike."""
        return (base_of(self.node), shape_of(self.node), self.turned)


def length_of(node: fx.Node, dim: int) -> int:
    """The size of a matrix along a dimension in which it is joined with others [elements]."""
    size = shape_of(node)[dim]
    assert isinstance(size, int), f"{node.name} is joined along {size}"
    return size


def itemsize(node: fx.Node) -> int:
    """Element width of a tensor [B]."""
    val = example_of(node)
    assert val is not None
    return val.itemsize


def transposed_of(node: fx.Node) -> fx.Node | None:
    """The matrix that a node shows the transpose of; None if it shows none."""
    args: Any = node.args
    is_transpose = (
        node.target is _aten.t.default
        or (node.target is _aten.permute.default and list(args[1]) == [1, 0])
        or (node.target is _aten.transpose.int and {d % 2 for d in args[1:]} == {0, 1})
    )
    facts = facts_of(node)
    if not is_transpose or node.kwargs or facts is None or len(facts.shape) != 2:
        return None
    assert isinstance(args[0], fx.Node)
    return args[0]


def is_sum(node: fx.Node) -> bool:
    """True if a node adds up two matrices of its own sizes."""
    if node.target is not _aten.add.Tensor or node.kwargs:
        return False
    facts = facts_of(node)
    given = [facts_of(x) for x in node.args]
    return facts is not None and all(g is not None and g.shape == facts.shape for g in given)


def matrix_of(node: fx.Node, hint: Callable[[Dim], int]) -> Matrix | None:
    """The matrix that a node holds; None if it lies in no such way.

    Args:
        node: A node.
        hint: The size of a symbolic dimension when the graph was traced.
    """
    inner = transposed_of(node)
    held = node if inner is None else inner
    if not _is_laid_out(held):
        return None
    rows, cols = map(hint, shape_of(held))
    return Matrix(held, inner is not None, rows * cols * itemsize(held))


def is_matrix(node: fx.Node) -> bool:
    """True if a node holds a matrix, or the transpose of one."""
    return _is_laid_out(transposed_of(node) or node)


def _is_laid_out(node: fx.Node) -> bool:
    """True if a node is known to hold a matrix row by row, without gaps. No guard is added."""
    facts = facts_of(node)
    if facts is None or not facts.is_plain or len(facts.shape) != 2 or 0 in facts.shape:
        return False
    (rows, cols), (first, last) = facts.shape, strides_of(node)
    return (first == cols or rows == 1) and (last == 1 or cols == 1)


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
