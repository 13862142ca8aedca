"""Reductions: sums of elementwise products that have a factor in common share one reduction.

Where a vector scales the sum of a base layer and its adapter, as DoRA's magnitude does, autograd
reduces a product for each of the two: ``sum(dY * P) + sum(c dY * Q)``. Both have to exist for it.
``sum(dY * (P + c Q))`` needs their sum only, which may be had as one product with the merged
weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from runlora_fx.passes.dialects.base import Dialect
from runlora_fx.passes.forms import Reshape, Scale, shape_of
from runlora_fx.passes.opaque import opaque_nodes
from runlora_fx.passes.read import GraphReader
from runlora_fx.passes.writer import Writer

_ADD = torch.ops.aten.add.Tensor
_MUL = torch.ops.aten.mul.Tensor
_SUM = torch.ops.aten.sum.dim_IntList


class _Reduction(NamedTuple):
    """``view(sum(first * second))``, which nothing else reads."""

    node: fx.Node
    first: fx.Node
    second: fx.Node


def share_reductions(graph: fx.Graph, dialect: Dialect) -> int:
    """Rewrite a joint graph in place.

    Returns:
        How many reductions were saved.
    """
    if not any(_of_sum(node) for node in graph.nodes):
        return 0
    reader = GraphReader(graph, dialect, opaque_nodes(graph, dialect))
    writer = Writer(graph, reader, dialect)
    found = 0
    for node in list(graph.nodes):
        pair = _of_sum(node)
        merged = pair and _merged(reader, writer, node, *pair)
        if merged:
            node.replace_all_uses_with(merged)
            found += 1
    if found:
        graph.eliminate_dead_code()
    return found


def _of_sum(node: fx.Node) -> tuple[_Reduction, _Reduction] | None:
    """The two reductions that a node adds up."""
    if node.target is not _ADD or node.kwargs:
        return None
    one, other = map(_reduction, node.args)
    if one is None or other is None or shape_of(one.first) != shape_of(other.first):
        return None
    return (one, other) if one.node.args[1:] == other.node.args[1:] else None


def _reduction(node: object) -> _Reduction | None:
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.target is torch.ops.aten.view.default:
            node = node.args[0]
        elif node.target is _SUM:
            product = node.args[0]
            if not isinstance(product, fx.Node) or product.target is not _MUL:
                return None
            first, second = product.args
            if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
                return None
            is_single = len(product.users) == 1
            return _Reduction(node, first, second) if is_single else None
        else:
            return None
    return None


def _merged(
    reader: GraphReader, writer: Writer, node: fx.Node, one: _Reduction, other: _Reduction
) -> fx.Node | None:
    """Both reductions as one, if they share a factor and the others are linear."""
    for shared, left in ((one.first, one.second), (one.second, one.first)):
        for again, right in ((other.first, other.second), (other.second, other.first)):
            (common, a), (same, b) = _unscaled(reader, shared), _unscaled(reader, again)
            if reader.values.of(common) != reader.values.of(same):
                continue
            if not any(_is_linear(reader, x) for x in (left, right)):
                continue
            if shape_of(common) != shape_of(left) or shape_of(left) != shape_of(right):
                continue
            writer.move_to(node)
            total = writer.add(writer.scale(left, a), writer.scale(right, b))
            product = writer.scale(common, total)
            reduced = writer.again(one.node, product)
            return writer.reshape(reduced, shape_of(node))
    return None


def _unscaled(reader: GraphReader, node: fx.Node) -> tuple[fx.Node, float]:
    """A tensor without the numbers that it is multiplied by, and their product."""
    by = 1.0
    while isinstance(form := reader.forms.get(node), Scale) and not isinstance(form.by, fx.Node):
        node, by = form.source, by * form.by
    return node, by


def _is_linear(reader: GraphReader, node: fx.Node) -> bool:
    while isinstance(form := reader.forms.get(node), Reshape | Scale) and node not in reader.cuts:
        node = form.source
    return node in reader.cuts
