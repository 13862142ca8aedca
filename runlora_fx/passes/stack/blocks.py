"""Blocks: what a rectangle of a matrix is, as a sum of products of rectangles of other matrices.

    slice(mm(x, permute(cat([m, a]))), 1, 0, 64)      ->      x m'

Before a graph is changed every product is read so, and afterwards what takes its place. This reader
knows nothing of how stacks are made.

Invariant: equal results mean equal numbers, up to rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx

from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.levels.sizes import shape_of
from runlora_fx.passes.stack.matrices import base_of, is_sum, length_of, transposed_of

_aten = torch.ops.aten

#: From the first row or column to the one behind the last.
_Span: TypeAlias = tuple[Dim, Dim]

#: Of rows and columns.
_Spans: TypeAlias = tuple[_Span, _Span]


class _Block(NamedTuple):
    """A rectangle of a matrix.

    Attributes:
        node: The matrix.
        spans: The rows of the node, and the columns.
        turned: True if the transpose of the rectangle is meant.
    """

    node: fx.Node
    spans: _Spans
    turned: bool = False

    @property
    def key(self) -> Hashable:
        """The same for equal rectangles of what holds the numbers."""
        return (base_of(self.node), shape_of(self.node), self.spans, self.turned)


def blocks_of(node: fx.Node) -> Counter[Hashable]:
    """What a matrix is: the pairs of blocks that are multiplied, and how often each is added."""
    rows, cols = shape_of(node)
    return Counter(_terms(_Block(node, ((0, rows), (0, cols)))))


def _terms(block: _Block) -> Iterator[Hashable]:
    """The products that make a block; a block that is no product is one term by itself."""
    block = _resolved(block)
    node = block.node
    if is_sum(node):
        for addend in node.args:
            assert isinstance(addend, fx.Node)
            yield from _terms(block._replace(node=addend))
    elif node.target is _aten.mm.default:
        yield from _products(block)
    else:
        yield block.key


def _products(block: _Block) -> Iterator[Hashable]:
    """The products of a product, cut where its operands are joined along the inner dimension."""
    left, right = block.node.args
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    rows, cols = block.spans
    _, inner = shape_of(left)
    joints = sorted({*_joints(left, 1), *_joints(right, 0)} - {0, inner})
    for span in pairwise([0, *joints, inner]):
        first = _resolved(_Block(left, (rows, span)))
        last = _resolved(_Block(right, (span, cols)))
        if block.turned:
            first, last = (b._replace(turned=not b.turned) for b in (last, first))
        yield (first.key, last.key)


def _joints(node: fx.Node, dim: int) -> list[int]:
    """Where a matrix is joined of parts that follow each other along a dimension."""
    if (shown := transposed_of(node)) is not None:
        return _joints(shown, 1 - dim)
    if (cut := _cut(node)) is not None:
        whole, at, begin = cut
        ends = _joints(whole, dim)
        if at != dim:
            return ends
        size = shape_of(node)[dim]
        is_number = isinstance(size, int)
        return [end - begin for end in ends if is_number and 0 < end - begin < size]
    if (joined := _joined(node)) is not None and joined[1] == dim:
        return list(accumulate(length_of(part, dim) for part in joined[0]))
    return []


def _resolved(block: _Block) -> _Block:
    """The same block, of a matrix that is neither cut nor joined nor copied."""
    while True:
        node, spans, turned = block
        if (shown := transposed_of(node)) is not None:
            block = _Block(shown, (spans[1], spans[0]), not turned)
        elif (cut := _cut(node)) is not None:
            whole, dim, begin = cut
            block = _Block(whole, _moved(spans, dim, begin), turned)
        elif node.target is _aten.clone.default and isinstance(node.args[0], fx.Node):
            block = _Block(node.args[0], spans, turned)
        elif (part := _part(node, spans)) is not None:
            block = _Block(*part, turned)
        else:
            return block


def _part(node: fx.Node, spans: _Spans) -> tuple[fx.Node, _Spans] | None:
    """The joined part that some rows and columns lie in; None if they lie in several."""
    joined = _joined(node)
    if joined is None:
        return None
    parts, dim = joined
    first, last = spans[dim]
    if not isinstance(first, int) or not isinstance(last, int):
        return None
    begin = 0
    for part in parts:
        end = begin + length_of(part, dim)
        if begin <= first and last <= end:
            return part, _moved(spans, dim, -begin)
        begin = end
    return None


def _moved(spans: _Spans, dim: int, by: int) -> _Spans:
    moved = (spans[dim][0] + by, spans[dim][1] + by)
    return (moved, spans[1]) if dim == 0 else (spans[0], moved)


# -- what nodes are ----------------------------------------------------------------------------


def _cut(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """What a node is a part of without gaps, along which dimension, and where the part begins."""
    args: Any = (*node.args, *(None,) * 5)[:5]
    whole, dim, begin, _, step = args
    dim, begin = dim or 0, begin or 0
    if node.target is not _aten.slice.Tensor or node.kwargs or step not in (None, 1):
        return None
    is_plain = isinstance(begin, int) and begin >= 0 and len(shape_of(node)) == 2
    return (whole, dim % 2, begin) if is_plain else None


def _joined(node: fx.Node) -> tuple[list[fx.Node], int] | None:
    """The matrices that a node joins, and along which dimension: there all sizes are numbers."""
    args: Any = node.args
    if node.target is not _aten.cat.default or node.kwargs or len(shape_of(node)) != 2:
        return None
    parts, dim = list(args[0]), (args[1] if len(args) > 1 else 0) % 2
    shapes = list(map(shape_of, parts))
    is_plain = all(len(shape) == 2 and isinstance(shape[dim], int) for shape in shapes)
    return (parts, dim) if is_plain else None
