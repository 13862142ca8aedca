"""Matrices: the operands of products as they lie in memory.

    permute(view(x, [2048, 1024]), [1, 0])      ->      Matrix(the view, turned)

Invariant: two matrices of equal keys hold the same numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import fx

from runlora_fx.passes.levels.operators import RESHAPES
from runlora_fx.passes.levels.sizes import example_of, facts_of, shape_of

_aten = torch.ops.aten


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
        return (base_of(self.node), sizes_of(self.node), self.turned)

    @property
    def size(self) -> int:
        """What it takes in memory [B]."""
        return size_of(self.node)


def sizes_of(node: fx.Node) -> tuple[int, ...]:
    """The sizes of a tensor that has no symbolic ones."""
    return cast(tuple[int, ...], shape_of(node))


def size_of(node: fx.Node) -> int:
    """What a matrix takes in memory [B]."""
    rows, cols = sizes_of(node)
    return rows * cols * itemsize(node)


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


def matrix_of(node: fx.Node) -> Matrix | None:
    """The matrix that a node holds; None if it lies in no such way, or its sizes are symbolic."""
    inner = transposed_of(node)
    turned = inner is not None
    node = node if inner is None else inner
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
