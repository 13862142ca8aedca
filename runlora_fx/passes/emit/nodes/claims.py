"""Claims: the form that the writer says a call has is compared with the call that was written.

    sum(m, [0, 1], True)  is written as  Total(m, rows=True)      ->      the claim holds
    sum(m, [2], True)     is written as  Total(m, rows=True)      ->      an EmissionError

The readers cannot tell what some calls mean (:mod:`runlora_fx.passes.emit.nodes.matrices`), so
the writer says it. Without this check, verification would believe the writer.

Invariant: calls are compared by value numbers. A claim that holds names what the call computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from runlora_fx.passes.levels.forms import (
    Broadcast,
    Copy,
    DiagonalMultiple,
    DiagonalOfProduct,
    Form,
    Reshape,
    Total,
    Written,
)
from runlora_fx.passes.levels.forms.assigned import OuterProduct, ProductOfBatch, SumOfRows
from runlora_fx.passes.levels.level import Calls
from runlora_fx.passes.levels.origins import Attribute, Computed, OnesColumn
from runlora_fx.passes.levels.sizes import example_of, is_one, shape_of
from runlora_fx.passes.read.value_numbers import ValueNumbers

_aten, _prims = torch.ops.aten, torch.ops.prims


class _Expected(NamedTuple):
    """A call that a form stands for: the node that should make it, and the call."""

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - never changed


class _NotSo(Exception):
    """A call cannot be what a form says."""


def holds(node: fx.Node, form: Form, calls: Calls, values: ValueNumbers) -> bool:
    """True if a written call computes a form.

    Args:
        node: The call.
        form: What the writer says about it.
        calls: The calls that the level writes.
        values: The value numbers of the graph.
    """
    try:
        return all(_is_made(call, values) for call in _calls_of(form, node, calls, values))
    except (_NotSo, IndexError, AttributeError, TypeError, ValueError):
        return False  # the arguments are none that such a call has


def _is_made(call: _Expected, values: ValueNumbers) -> bool:
    found = call.node
    key = values.key("call_function", call.target, call.args, call.kwargs)
    return key is not None and key == values.key(found.op, found.target, found.args, found.kwargs)


def _calls_of(form: Form, node: fx.Node, calls: Calls, values: ValueNumbers) -> Iterator[_Expected]:
    """The calls that compute a form, and the nodes that should make them."""
    args: Any = node.args
    match form:
        case DiagonalMultiple(source, by, rows):
            yield _Expected(node, calls.mul, (source, by))
            *others, last = shape_of(by)
            _require(is_one(last) if rows else all(map(is_one, others)))
        case OuterProduct(left, right):
            yield _Expected(node, calls.mul, (left.node, right.node))
            column, row = left.node, right.node
            _require(column is not None and is_one(shape_of(column)[-1]))
            _require(row is not None and is_one(shape_of(row)[-2]))
        case Broadcast(source):
            yield _Expected(node, calls.expand, (source, args[1]))
        case Reshape(source):
            val = example_of(node)
            yield _Expected(node, calls.cast, (source, None if val is None else val.dtype))
        case Total(source, rows):
            n = len(shape_of(source))
            yield _Expected(node, calls.sum, (source, [*range(n - 1)] if rows else [n - 1], True))
        case DiagonalOfProduct(left, right):
            yield _Expected(node, calls.sum, (args[0], [1 if right.transposed else 0]))
            yield _Expected(args[0], calls.mul, (left.node, right.node))
        case SumOfRows(by, source, zeros):
            yield _Expected(node, _aten.index_put.default, (zeros, [by.node], source, True))
            yield _Expected(zeros, calls.full, (zeros.args[0], 0), dict(zeros.kwargs))
        case ProductOfBatch():
            yield from _product_with_all(form, node, calls, values)
        case Copy(source):
            _require(_is_copy(node, source, calls, values))
        case Written(OnesColumn()):
            yield _Expected(node, calls.full, (args[0], 1.0), dict(node.kwargs))
        case Written(Computed() as origin):
            yield from _computed(node, origin)
        case Written(Attribute(target)):
            _require((node.op, node.target) == ("get_attr", target))
        case _:
            raise _NotSo


def _computed(node: fx.Node, origin: Computed) -> Iterator[_Expected]:
    """The call of a computed tensor, and those among its arguments."""
    pairs: list[tuple[Any, Any]] = list(zip(origin.args, node.args, strict=True))
    args = tuple(arg if isinstance(x, Computed) else x for x, arg in pairs)
    yield _Expected(node, origin.target, args)
    for x, arg in pairs:
        if isinstance(x, Computed):
            yield from _computed(arg, x)


def _product_with_all(
    form: ProductOfBatch, node: fx.Node, calls: Calls, values: ValueNumbers
) -> Iterator[_Expected]:
    """Rows times the matrices of all experts, of which each token's own products are picked."""
    args: Any = node.args
    every, (own, _, _) = args
    yield _Expected(node, _aten.index.Tensor, (every, [own, None, form.by.node]))
    steps = {**own.kwargs, "start": 0, "step": 1}
    yield _Expected(own, _prims.iota.default, own.args, steps)
    product = _viewed(every, calls)
    rows, matrices = product.args
    yield _Expected(product, calls.mm, (rows, matrices))
    _require(values.of(_viewed(rows, calls)) == values.of(_viewed(form.left.node, calls)))
    yield _Expected(matrices, calls.permute, (matrices.args[0], [1, 0]))
    turned, stack = _viewed(matrices.args[0], calls), form.right.node
    is_undone = stack.target is calls.permute and stack.args == (turned, [0, 2, 1])
    if not is_undone:
        yield _Expected(turned, calls.permute, (stack, [0, 2, 1]))


def _viewed(node: Any, calls: Calls) -> Any:
    """What a node is a view of, with the elements in the same order."""
    while node.target in (calls.view, calls.reshape):
        node = node.args[0]
    return node


def _is_copy(node: fx.Node, source: fx.Node, calls: Calls, values: ValueNumbers) -> bool:
    """True if copies and permutations lead from a node to its source, and undo each other."""
    at: Any = node
    order = list(range(len(shape_of(node))))
    while values.of(at) != values.of(source):
        if at.target is calls.permute:
            dims = at.args[1]
            order = [dims[d] for d in order]
        elif at.target is not calls.clone:
            return False
        at = at.args[0]
    return order == sorted(order)


def _require(is_so: bool) -> None:
    if not is_so:
        raise _NotSo
