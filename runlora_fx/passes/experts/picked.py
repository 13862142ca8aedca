"""Gathers: products with rows of a merged stack of expert weights, taken from its factors instead.

PEFT's adapters on expert weights merge the whole stack, ``W + s L R`` of shape (experts, out, in),
in every forward. Where each token then picks its expert's weight and multiplies by it,

    (W + s L R)[k] x          =  W[k] x + s L[k] (R[k] x)
    scatter_k(u v') Q         =  scatter_k(u (v' Q[k]))
    Q scatter_k(u v')         =  scatter_k((Q[k] u) v')

the left sides cost experts * out * in * rank for the merged stack and for each of the gradients of
L and R, the right sides tokens * (out + in) * rank. Also the second and third line make gradients
of the size of the factors only, not of all weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx

from runlora_fx.passes.context import Context, Outcome
from runlora_fx.passes.emit.nodes import Inserter, hand_over
from runlora_fx.passes.emit.recompute import recompute
from runlora_fx.passes.emit.transaction import attempt
from runlora_fx.passes.experts.stacks import (
    Merged,
    Mixture,
    Use,
    batched_uses,
    is_turned,
    merged_stack,
    possible_stacks,
    sizes,
    transpose,
    untransposed,
)
from runlora_fx.passes.levels.sizes import value_of
from runlora_fx.passes.read.effects import Effects

_aten = torch.ops.aten

#: What multiplies a column by a row.
_OUTER = (_aten.mul.Tensor, _aten.bmm.default)


def split_gathered_weights(context: Context) -> Outcome:
    """Split products with gathered rows of merged stacks, where that costs less.

    Args:
        context: A graph of ATen operators; no other has what is looked for.

    Returns:
        The merged stacks (:class:`Mixture`), and whether their products were split.
    """
    if context.options.numerics == "strict":
        return Outcome()
    graph = context.graph
    insert, effects = Inserter(graph, "experts: picked weights are split"), context.effects()
    found: list[Mixture] = []
    for node in possible_stacks(graph):
        with attempt(context, node.name):
            mixture = _split(insert, effects, node)
            if mixture is not None:
                found.append(mixture)
    if any(mixture.split for mixture in found):
        graph.eliminate_dead_code()
    return Outcome(tuple(found))


def _split(insert: Inserter, effects: Effects, node: fx.Node) -> Mixture | None:
    """Split the products with a stack; None if the node is none whose readers are known."""
    merged = merged_stack(node)
    if merged is None:
        return None
    picks = list(node.users)
    uses = [batched_uses(pick) if _indices(pick, node) is not None else None for pick in picks]
    sums = _scattered(node.graph, merged)
    if None in uses or not picks:
        return None
    if any(map(effects.is_overwritten, _involved(node, picks, uses, sums))):
        return None
    mixture = _mixture(node, merged, picks, sums)
    if mixture.flops_split >= mixture.flops_merged:
        return mixture
    for pick, products in zip(picks, uses, strict=True):
        _split_pick(insert, merged, pick, products or [])
    for scatter in sums:
        _split_scatter(insert, scatter)
    return replace(mixture, split=True)


# --- what is looked for


def _involved(
    stack: fx.Node, picks: list[fx.Node], uses: list[list[Use] | None], sums: list[_Scatter]
) -> set[fx.Node]:
    """What is read at another place after a split, and what is written there."""
    products = [use.product for group in uses for use in group or []]
    nodes = {stack, *picks, *products, *(s.node for s in sums)}
    read = {x for node in nodes for x in node.all_input_nodes}
    return nodes | read | {x for s in sums for x in (s.column, s.row)}


def _indices(pick: fx.Node, stack: fx.Node) -> fx.Node | None:
    """The indices by which a node picks from the first dimension of another."""
    if pick.target is not _aten.index.Tensor or pick.args[0] is not stack:
        return None
    indices = pick.args[1]
    return _single(indices) if sizes(pick) is not None else None


def _single(indices: Any) -> fx.Node | None:
    if not isinstance(indices, list | tuple) or len(indices) != 1:
        return None
    val = value_of(indices[0])
    is_plain = val is not None and val.dim() == 1 and val.dtype in (torch.int32, torch.int64)
    return indices[0] if is_plain else None


class _Scatter(NamedTuple):
    """``zeros.index_put([k], column * row, accumulate)`` and the products that read it.

    With ``turned`` it is the transpose of ``column * row`` that is summed.
    """

    node: fx.Node
    outer: Any
    indices: fx.Node
    column: fx.Node
    row: fx.Node
    turned: bool
    uses: list[Use]


def _scattered(graph: fx.Graph, merged: Merged) -> list[_Scatter]:
    """The gradients of a merged stack that only the gradients of its factors are made of."""
    factors = {merged.left, merged.right}
    found = []
    for node in graph.nodes:
        if node.target is not _aten.index_put.default or node.args[3:] != (True,):
            continue
        zeros, indices, outer = node.args[:3]
        if not _is_zero(zeros):
            continue
        uses, k = batched_uses(node), _single(indices)
        if uses is None or k is None or sizes(node) != sizes(merged.base):
            continue
        product = untransposed(outer)
        needed = {zeros, node, outer}.issuperset((*outer.users, *product.users))
        if product.target not in _OUTER or not needed:
            continue
        sides = {tuple(sizes(x) or ()): x for x in product.args if isinstance(x, fx.Node)}
        tokens, rows, columns = sizes(product) or (0, 0, 0)
        column, row = sides.get((tokens, rows, 1)), sides.get((tokens, 1, columns))
        if column is None or row is None or rows == 1 or columns == 1:
            continue
        if all(untransposed(use.other) in factors for use in uses):
            found.append(_Scatter(node, product.target, k, column, row, is_turned(outer), uses))
    return found


def _is_zero(node: fx.Node) -> bool:
    is_full = node.target is _aten.full.default and bool(node.args[1] == 0)
    return is_full or node.target in (_aten.new_zeros.default, _aten.zeros.default)


def _mixture(node: fx.Node, merged: Merged, picks: list[fx.Node], sums: list[_Scatter]) -> Mixture:
    """What a stack costs, merged or split; outer products of single tokens are elementwise."""
    experts, rows, columns = sizes(node) or (0, 0, 0)
    picked = sum((sizes(pick) or (0, 0, 0))[0] * len(batched_uses(pick) or []) for pick in picks)
    reading = sum((sizes(scatter.row) or (0, 0, 0))[0] * len(scatter.uses) for scatter in sums)
    rank, readers = (sizes(merged.left) or (0, 0, 0))[2], sum(len(s.uses) for s in sums)
    return Mixture(node, experts, rows, columns, rank, picked, 0, reading, readers, gathered=True)


# --- what is written


def _split_pick(insert: Inserter, merged: Merged, pick: fx.Node, uses: list[Use]) -> None:
    indices = pick.args[1]
    insert.move_to(pick)
    parts = [insert(_aten.index.Tensor, x, indices) for x in merged[:3]]
    recompute(parts, parts)  # as cheap as any view, and as large as everything that is picked
    for use in uses:
        insert.move_to(use.product)
        base, left, right = parts
        if use.transposed:
            base, left, right = (transpose(insert, x) for x in (base, right, left))
        if use.is_left:
            low = insert(_aten.bmm.default, left, insert(_aten.bmm.default, right, use.other))
            first = insert(_aten.bmm.default, base, use.other)
        else:
            low = insert(_aten.bmm.default, insert(_aten.bmm.default, use.other, left), right)
            first = insert(_aten.bmm.default, use.other, base)
        scaled = insert(_aten.mul.Tensor, low, merged.alpha)
        hand_over(use.product, insert(_aten.add.Tensor, first, scaled))


def _split_scatter(insert: Inserter, scatter: _Scatter) -> None:
    experts = value_of(scatter.node)
    assert experts is not None
    for use in scatter.uses:
        insert.move_to(use.product)
        factor = insert(_aten.index.Tensor, untransposed(use.other), [scatter.indices])
        turned = use.other is not untransposed(use.other)
        factor = transpose(insert, factor) if turned else factor
        column, row = scatter.column, scatter.row
        if use.transposed != scatter.turned:
            column, row = (transpose(insert, x) for x in (row, column))
        if use.is_left:
            row = insert(_aten.bmm.default, row, factor)
        else:
            column = insert(_aten.bmm.default, factor, column)
        outer = insert(scatter.outer, column, row)
        val = value_of(outer)
        assert val is not None
        shape = [len(experts), *val.shape[1:]]
        empty = insert(_aten.full.default, shape, 0, dtype=val.dtype, device=val.device)
        summed = insert(_aten.index_put.default, empty, [scatter.indices], outer, True)
        hand_over(use.product, summed)
