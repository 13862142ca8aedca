"""Causes that the graph shows: why an adapter has nothing to be merged with, and what to do.

    dX = ..., Y' = D(X) A' B'        ->      Cause("dropout", ...)

An adapter merges with its base weight if both multiply the same input. If they do not, the graph
says what stands between.

Invariant: a cause is only given for a site that was left alone and has no base weight.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.levels.operators import (
    CASTS,
    COMPOSED_PRODUCTS,
    PRODUCTS,
    VIEWS,
    is_pointwise,
    names_of,
    readers_of,
)
from runlora_fx.passes.levels.sizes import example_of
from runlora_fx.passes.read.calls import name_of
from runlora_fx.passes.read.regions import Region
from runlora_fx.report.sites import Cause

DROPOUT = Cause(
    "dropout",
    "the adapter reads a dropped-out input and its layer does not, so they cannot be merged",
    "set lora_dropout=0 if the training allows it",
)
CAST = Cause(
    "cast",
    "the adapter computes in another dtype than its layer, so they cannot be merged",
    "run under torch.autocast, or set runlora.numerics to 'relaxed'",
)

#: The most nodes between an operand and the mask or cast that explains it.
_MOST_NODES = 24

_PRODUCTS = names_of(PRODUCTS | COMPOSED_PRODUCTS)
_DROPOUTS = frozenset(["dropout", "native_dropout", "feature_dropout"])


def causes_of(region: Region, problem: Problem) -> tuple[Cause, ...]:
    """What keeps the adapters of a region from being merged, as far as the graph shows it."""
    if has_base(problem):
        return ()
    products = [made.node for made in region.incoming if not made.backward]
    operands = {node for product in products for node in product.all_input_nodes}
    behind_them = {node for operand in operands for node in behind(operand)}
    signs = ((DROPOUT, _is_mask), (CAST, _changes_dtype))
    return tuple(cause for cause, is_sign in signs if any(map(is_sign, behind_them)))


def has_base(problem: Problem) -> bool:
    """True if some sum has a product of two matrices beside one of three or more."""
    words = [{len(word.without_diagonals) for word in d.core.words} for d in problem.demands]
    return any(2 in lengths and max(lengths) > 2 for lengths in words)


def behind(node: fx.Node) -> Iterator[fx.Node]:
    """A node, and what pointwise operators, casts and views make it of; the nearest first."""
    pending, seen = [node], set[fx.Node]()
    while pending and len(seen) < _MOST_NODES:
        current = pending.pop(0)
        if current in seen:
            continue
        seen.add(current)
        yield current
        target = current.target
        passes = target is operator.getitem or name_of(target) in _DROPOUTS
        if passes or is_pointwise(target) or target in CASTS or target in VIEWS:
            pending += current.all_input_nodes


def _is_mask(node: fx.Node) -> bool:
    """True if a node drops elements out, or draws the random numbers for that."""
    target = node.target
    is_random = isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags
    )
    return is_random or (node.op == "call_function" and name_of(target) in _DROPOUTS)


def _changes_dtype(node: fx.Node) -> bool:
    """True if a node converts what a product reads in another floating-point dtype."""
    made = example_of(node)
    given = node.all_input_nodes
    if node.target not in CASTS or made is None or len(given) != 1:
        return False
    came = example_of(given[0])
    if came is None or came.dtype == made.dtype:
        return False
    are_floats = came.dtype.is_floating_point and made.dtype.is_floating_point
    return are_floats and any(name_of(r.target) in _PRODUCTS for r in readers_of(given[0]))
