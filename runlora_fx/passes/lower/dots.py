"""Dots: sums of elementwise products along rows or columns, gathered into one node; and back.

Autograd reduces ``sum(dY * P)`` for a vector that scales rows or columns of P: the magnitudes of
DoRA, the gates of a mixture, the vectors of VeRA. Where P is a product, that is the diagonal of a
product of three matrices or more, which need not begin with P. As one node it can be read, and
planned with all else; in the end every such node is spelled out as the compiler knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from string import ascii_lowercase
from typing import Any, NamedTuple, cast

import torch
from torch import fx

from runlora_fx.passes.emit.nodes import Inserter
from runlora_fx.passes.emit.transaction import transaction
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.levels.sizes import same_shape, shape_of, value_of
from runlora_fx.passes.read.effects import Effects

_EINSUM = torch.ops.aten.einsum.default
_MUL = torch.ops.aten.mul.Tensor
_SUM = torch.ops.aten.sum.dim_IntList
_UNSQUEEZE = torch.ops.aten.unsqueeze.default


class _Call(NamedTuple):
    """A node that was taken out of the graph."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]
    name: str

    @staticmethod
    def of(node: fx.Node) -> _Call:
        target = cast(Callable[..., Any], node.target)
        return _Call(target, node.args, dict(node.kwargs), dict(node.meta), node.name)


class _Gathered(NamedTuple):
    """``sum(a * b, dims)`` as it came, and what stands in its place."""

    product: _Call
    reduction: _Call
    dots: fx.Node
    result: fx.Node


@contextmanager
def gathered_dots(graph: fx.Graph, dialect: Dialect) -> Iterator[None]:
    """A context in which all dots of products in a graph are one node each.

    In the end those that are still there are put back as they came, and those that were written
    meanwhile are spelled out. Whatever is raised inside leaves the graph as it came.
    """
    with transaction(graph):
        gathered = _GatheredDots(graph, dialect)
        gathered.gather()
        yield
        gathered.undo()


class _GatheredDots:
    """The dots of a graph, each as one node."""

    def __init__(self, graph: fx.Graph, dialect: Dialect) -> None:
        self._graph = graph
        self._dialect = dialect
        self._effects = Effects(graph)
        self._own = {node for node in graph.nodes if _is_dots(dialect, node)}
        self._gathered: list[_Gathered] = []

    def gather(self) -> None:
        """Gather all dots of products, in place."""
        insert = Inserter(self._graph, "diagonal of a product: a sum of elementwise products")
        for node in list(self._graph.nodes):
            operands = self._operands(node)
            if operands is not None:
                insert.move_to(node)
                self._gather(insert, node, *operands)

    def undo(self) -> None:
        """Put back what is still there as it came; spell out what was written."""
        alive = set(self._graph.nodes)
        for gathered in self._gathered:
            if gathered.result not in alive or gathered.dots not in alive:
                continue
            # What is multiplied may itself have been written anew.
            operands = tuple(cast(Any, gathered.dots.args[1]))
            with self._graph.inserting_before(gathered.result):
                product = self._again(gathered.product, operands)
                rest = gathered.reduction.args[1:]
                reduction = self._again(gathered.reduction, (product, *rest))
            gathered.result.replace_all_uses_with(reduction)
            for node in dict.fromkeys((gathered.result, *_between(gathered))):
                self._graph.erase_node(node)
            product.name, reduction.name = gathered.product.name, gathered.reduction.name
        spell_out(self._graph, self._dialect, self._own)

    def _again(self, call: _Call, args: tuple[Any, ...]) -> fx.Node:
        node = self._graph.call_function(call.target, args, call.kwargs)
        node.meta = call.meta
        return node

    def _operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The two tensors of which a node sums up the products along rows or columns."""
        if node.target is not _SUM or node.kwargs:
            return None
        product = node.args[0]
        if not isinstance(product, fx.Node) or product.target is not _MUL or product.kwargs:
            return None
        # One node in the place of the sum multiplies there.
        if not self._effects.is_movable(product, node) or self._effects.is_overwritten(node):
            return None
        a, b = product.args
        if len(product.users) > 1 or not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
            return None
        here, one, other, summed = map(value_of, (product, a, b, node))
        if here is None or one is None or other is None or summed is None or here.dim() < 2:
            return None
        is_alike = same_shape(shape_of(a), shape_of(b)) and here.dtype == one.dtype == other.dtype
        if not is_alike or summed.dtype != here.dtype or not _along(node, here.dim()):
            return None
        is_product = any(self._dialect.is_made_of_product(operand) for operand in (a, b))
        return (a, b) if is_product else None

    def _gather(self, insert: Inserter, node: fx.Node, a: fx.Node, b: fx.Node) -> None:
        product, n = cast(fx.Node, node.args[0]), len(shape_of(a))
        along = _along(node, n)
        letters = ascii_lowercase[:n]
        out = letters[:-1] if along == "rows" else letters[-1]
        dots = result = insert(_EINSUM, f"{letters},{letters}->{out}", [a, b])
        if len(node.args) > 2 and node.args[2]:  # keepdim
            for _ in range(1 if along == "rows" else n - 1):
                result = insert(_UNSQUEEZE, result, -1 if along == "rows" else 0)
        self._gathered.append(_Gathered(_Call.of(product), _Call.of(node), dots, result))
        node.replace_all_uses_with(result)
        self._graph.erase_node(node)
        self._graph.erase_node(product)


def spell_out(graph: fx.Graph, dialect: Dialect, but: set[fx.Node] | None = None) -> None:
    """Write every node of dots as a product and a sum, in place.

    Args:
        graph: A graph of ATen operators.
        dialect: Its level.
        but: The nodes to leave alone.
    """
    insert = Inserter(graph, "diagonal of a product: a sum of elementwise products")
    for node in list(graph.nodes):
        if node in (but or ()) or not _is_dots(dialect, node):
            continue
        equation, operands = cast(tuple[str, list[fx.Node]], node.args)
        letters, out = equation.replace(" ", "").split(",")[0], equation.split("->")[1].strip()
        n = len(letters)
        insert.move_to(node)
        product = insert(_MUL, *operands)
        dims = [n - 1] if out == letters[:-1] else list(range(n - 1))
        node.replace_all_uses_with(insert(_SUM, product, dims))
        graph.erase_node(node)


def _is_dots(dialect: Dialect, node: fx.Node) -> bool:
    form = dialect.read(node) if node.target is _EINSUM else None
    return form is not None and form.makes_vector


def _along(node: fx.Node, n: int) -> str | None:
    """Whether a sum leaves the rows or the columns of a matrix that shows the last dimension."""
    dims = {int(d) % n for d in cast(list[int], node.args[1])}
    if dims == {n - 1}:
        return "rows"
    return "columns" if dims == set(range(n - 1)) else None


def _between(gathered: _Gathered) -> Iterator[fx.Node]:
    """The nodes from the result down to the dots."""
    node = gathered.result
    while node is not gathered.dots:
        node = cast(fx.Node, node.args[0])
        yield node
