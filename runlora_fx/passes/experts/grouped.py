"""Grouped products with a merged stack of expert weights, taken from its factors instead.

A grouped product multiplies rows, sorted by expert, by the weights of their experts. With PEFT's
adapters on these, the stack ``M = W + s L R`` of all experts is merged in every forward. Few tokens
multiply by its factors instead, also in the backward, where ``dM = P' Q``, a matrix for each
expert, is made for the gradients of L and R only:

    X M    =  X W + s (X L) R
    dM R'  =  P' (Q R')
    L' dM  =  (P L)' Q

Two operators are known: ``aten::_grouped_mm``, and what transformers has where that does not run.
"""

from __future__ import annotations

from dataclasses import replace
from operator import getitem
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from runlora_fx.passes.context import Context, Outcome
from runlora_fx.passes.emit.nodes import Inserter, hand_over
from runlora_fx.passes.emit.transaction import attempt
from runlora_fx.passes.experts.stacks import (
    Merged,
    Mixture,
    batched_uses,
    is_transpose,
    is_turned,
    merged_stack,
    possible_stacks,
    sizes,
    transpose,
    untransposed,
)
from runlora_fx.passes.levels.sizes import shape_of, value_of
from runlora_fx.passes.read.effects import Effects

_aten = torch.ops.aten
_GROUPED = "aten._grouped_mm.default"
_FALLBACK = "transformers.grouped_mm_fallback.default"
_FALLBACK_BACKWARD = "transformers.grouped_mm_fallback_backward.default"

#: What rows of the operands of ``aten::_grouped_mm`` are aligned to [B].
_ALIGNMENT = 16


class _Stack(NamedTuple):
    """A stack of matrices, or of their transposes."""

    node: fx.Node
    turned: bool

    @property
    def T(self) -> _Stack:
        """Of each the transpose."""
        return _Stack(self.node, not self.turned)


class _Product(NamedTuple):
    """``rows`` times the merged stack, or times its transposes."""

    node: fx.Node
    rows: fx.Node
    turned: bool
    offsets: fx.Node


class _Gradient(NamedTuple):
    """``left' right`` for each expert, in the orientation of the merged stack, or turned.

    Attributes:
        left: The rows of which the columns become rows.
        right: As many rows.
        turned: Whether it is the gradient of the transposed stack.
        offsets: Where each expert's rows end.
        readers: Products with the factors, and nothing else reads it: each with what it is of, the
            first or the second factor's gradient, and whether it is the transpose of that.
    """

    left: fx.Node
    right: fx.Node
    turned: bool
    offsets: fx.Node
    readers: tuple[tuple[fx.Node, bool, bool], ...]


def split_grouped_products(context: Context) -> Outcome:
    """Split grouped products with merged stacks, where that costs less.

    The number of tokens may be a symbol, guarded to be on this side of where both cost the same.

    Args:
        context: A graph of ATen operators; no other has what is looked for.

    Returns:
        The merged stacks (:class:`Mixture`), and whether their products were split.
    """
    if context.options.numerics == "strict":
        return Outcome()
    graph = context.graph
    insert, effects = Inserter(graph, "experts: grouped products are split"), context.effects()
    found: list[Mixture] = []
    for node in possible_stacks(graph):
        with attempt(context, node.name):
            mixture = _split(context, insert, effects, node)
            if mixture is not None:
                found.append(mixture)
    if any(mixture.split for mixture in found):
        graph.eliminate_dead_code()
    return Outcome(tuple(found))


def _split(context: Context, insert: Inserter, effects: Effects, node: fx.Node) -> Mixture | None:
    """Split the products with a stack; None if the node is none whose readers are known."""
    merged = merged_stack(node)
    products = None if merged is None else _products(node)
    if merged is None or not products or not _is_aligned(products, merged):
        return None
    gradients = _gradients(node.graph, merged, products)
    if gradients is None:
        return None
    if any(map(effects.is_overwritten, _involved(node, products, gradients))):
        return None
    mixture = _mixture(node, merged, products, gradients, context)
    if mixture is None or mixture.flops_split >= mixture.flops_merged:
        return mixture
    splitter = _Splitter(insert, merged, str(products[0].node.target) == _GROUPED)
    splitter.split(node.graph, products, gradients)
    return replace(mixture, split=True)


# --- what is looked for


def _involved(stack: fx.Node, products: list[_Product], gradients: list[_Gradient]) -> set[fx.Node]:
    """What is read at another place after a split, and what is written there."""
    nodes = {stack, *(p.node for p in products)}
    nodes |= {reader for gradient in gradients for reader, _, _ in gradient.readers}
    read = {x for node in nodes for x in node.all_input_nodes}
    return nodes | read | {x for gradient in gradients for x in (gradient.left, gradient.right)}


def _products(stack: fx.Node, *, turned: bool = False) -> list[_Product] | None:
    """The grouped products that read a stack or its transpose; None if anything else does."""
    found: list[_Product] = []
    for user in stack.users:
        if is_transpose(user):
            below = _products(user, turned=not turned)
            if below is None:
                return None
            found += below
        elif _is_grouped(user) and user.args[1] is stack:
            args: Any = user.args
            found.append(_Product(user, args[0], turned, args[2]))
        else:
            return None
    return found


def _is_grouped(node: fx.Node) -> bool:
    """Whether a node multiplies rows by a stack, or is the backward of that."""
    target = str(node.target)
    if node.kwargs or target not in (_GROUPED, _FALLBACK, _FALLBACK_BACKWARD):
        return False
    ranks = [val.dim() for val in map(value_of, node.args[:3]) if val is not None]
    return ranks == [2, 3, 1] and len(node.args) == (4 if target == _FALLBACK_BACKWARD else 3)


def _is_aligned(products: list[_Product], merged: Merged) -> bool:
    """Whether the operator takes operands as wide as the rank."""
    left = value_of(merged.left)
    assert left is not None
    takes_any = all(str(product.node.target) != _GROUPED for product in products)
    return takes_any or left.shape[-1] * left.itemsize % _ALIGNMENT == 0


def _gradients(graph: fx.Graph, merged: Merged, products: list[_Product]) -> list[_Gradient] | None:
    """The gradients of a merged stack that only those of its factors are made of.

    None if a product's own backward makes one that is needed for anything else.
    """
    found: list[_Gradient] = []
    for product in products:
        if str(product.node.target) != _FALLBACK_BACKWARD:
            continue
        args: Any = product.node.args
        for part in product.node.users:
            if part.args[1] != 1:
                continue
            readers = _factor_products(part, merged, product.turned)
            if readers is None:
                return None
            pair = (product.rows, args[3])
            found.append(_Gradient(*pair, product.turned, product.offsets, readers))
    for node in graph.nodes:
        if str(node.target) != _GROUPED or node.kwargs or len(node.args) != 3:
            continue
        rows, right, offsets = node.args
        left = rows.args[0] if _is_matrix_transpose(rows) else None
        val = value_of(right)
        if left is None or val is None or val.dim() != 2:
            continue
        for turned in (False, True):
            readers = _factor_products(node, merged, turned)
            if readers:
                found.append(_Gradient(left, right, turned, offsets, readers))
                break
    return found


def _factor_products(
    gradient: fx.Node, merged: Merged, turned: bool
) -> tuple[tuple[fx.Node, bool, bool], ...] | None:
    """What reads a gradient, as :attr:`_Gradient.readers`; None if that is more."""
    first, second = _factors(merged, turned)
    uses = batched_uses(gradient)
    if uses is None:
        return None
    found = []
    for reader, other, is_first, flipped in uses:
        # dM R' and its mirror image R dM' make L's gradient, L' dM and dM' L that of R.
        makes_first = is_first != flipped
        factor = second if makes_first else first
        wanted = factor if flipped else factor.T
        if _stack(other) != wanted:
            return None
        found.append((reader, makes_first, flipped))
    return tuple(found)


def _is_matrix_transpose(node: Any) -> bool:
    val = value_of(node)
    if val is None or val.dim() != 2:
        return False
    if node.target is _aten.permute.default:
        return list(node.args[1]) == [1, 0]
    if node.target is _aten.transpose.int:
        return {d % 2 for d in node.args[1:]} == {0, 1}
    return node.target is _aten.t.default


def _stack(node: fx.Node) -> _Stack:
    """A tensor, without the transposes that it was made by."""
    return _Stack(untransposed(node), is_turned(node))


def _factors(merged: Merged, turned: bool) -> tuple[_Stack, _Stack]:
    """L and R of the merged stack, or of its transpose."""
    left, right = map(_stack, (merged.left, merged.right))
    return (right.T, left.T) if turned else (left, right)


def _mixture(
    stack: fx.Node,
    merged: Merged,
    products: list[_Product],
    gradients: list[_Gradient],
    context: Context,
) -> Mixture | None:
    """What a stack costs, merged or split; None where the number of tokens cannot be known.

    A symbolic number is taken as it was when the graph was traced, and guarded.
    """
    numbers = {
        shape_of(rows)[0] for rows in [p.rows for p in products] + [g.left for g in gradients]
    }
    if len(numbers) != 1:
        return None
    (number,) = numbers
    is_known = isinstance(number, int) or context.may_guard
    tokens = context.hint(number, fallback=0) if is_known else 0
    if not tokens:
        return None
    experts, rows, columns = sizes(stack) or (0, 0, 0)
    readers = sum(len(gradient.readers) for gradient in gradients)
    found = Mixture(
        stack,
        experts,
        rows,
        columns,
        rank=(sizes(merged.left) or (0, 0, 0))[2],
        multiplied=tokens * len(products),
        outer=tokens * len(gradients),
        reading=tokens * readers,
        readers=readers,
    )
    return found if isinstance(number, int) else _guarded(found, number, tokens, context)


def _guarded(mixture: Mixture, number: sympy.Expr, tokens: int, context: Context) -> Mixture | None:
    """The mixture, for as many tokens as do not change what costs less; None if that fails.

    Merging costs a fixed number of FLOPs, and every token some more or less.
    """
    none = replace(mixture, multiplied=0, outer=0, reading=0)
    fixed = none.flops_merged - none.flops_split
    each = (fixed - (mixture.flops_merged - mixture.flops_split)) // tokens
    if each <= 0:  # however many there are, splitting costs less
        return mixture
    border = -(-fixed // each)
    splits = tokens < border
    low, high = (0, border) if splits else (border, None)
    is_guarded = context.guard(number, low, high)
    return replace(mixture, border=f"{number} >= {border}") if is_guarded else None


# --- what is written


class _Splitter:
    """Writes products with the factors of one merged stack; none of them twice."""

    def __init__(self, insert: Inserter, merged: Merged, is_aten: bool) -> None:
        self._insert = insert
        self._merged = merged
        self._is_aten = is_aten
        self._known: dict[tuple[fx.Node, _Stack, fx.Node], fx.Node] = {}

    def split(self, graph: fx.Graph, products: list[_Product], gradients: list[_Gradient]) -> None:
        """Split everything, in graph order: what was written stands before what reads it again."""
        by_node = {product.node: product for product in products}
        readers = {reader[0]: (g, reader) for g in gradients for reader in g.readers}
        for node in list(graph.nodes):
            self._insert.move_to(node)
            if node in by_node:
                self._split_product(by_node[node])
            elif node in readers:
                self._split_gradient(*readers[node])

    def _split_product(self, product: _Product) -> None:
        """``X M = X W + s (X L) R``; of a backward, ``dY M'`` likewise."""
        if str(product.node.target) != _FALLBACK_BACKWARD:
            split = self._times_merged(product.rows, product.turned, product.offsets)
            hand_over(product.node, split)
            return
        args: Any = product.node.args
        for part in list(product.node.users):
            if part.args[1] == 0:
                split = self._times_merged(args[3], not product.turned, product.offsets)
                hand_over(part, split)

    def _split_gradient(self, gradient: _Gradient, reading: tuple[fx.Node, bool, bool]) -> None:
        """``dM R' = P' (Q R')`` and ``L' dM = (P L)' Q``."""
        first, second = _factors(self._merged, gradient.turned)
        left, right, offsets = gradient.left, gradient.right, gradient.offsets
        reader, makes_first, flipped = reading
        if makes_first:
            low = self._times(right, second.T, offsets)
            made = self._outer(left, low, first, offsets)
        else:
            low = self._times(left, first, offsets)
            made = self._outer(low, right, second, offsets)
        hand_over(reader, transpose(self._insert, made) if flipped else made)

    def _times_merged(self, rows: fx.Node, turned: bool, offsets: fx.Node) -> fx.Node:
        first, second = _factors(self._merged, turned)
        base = self._times(rows, _Stack(self._merged.base, turned), offsets)
        low = self._times(self._times(rows, first, offsets), second, offsets)
        scaled = self._insert(_aten.mul.Tensor, low, self._merged.alpha)
        return self._insert(_aten.add.Tensor, base, scaled)

    def _times(self, rows: fx.Node, stack: _Stack, offsets: fx.Node) -> fx.Node:
        key = (rows, stack, offsets)
        if key not in self._known:
            matrices = self._written(stack)
            operator = (
                _aten._grouped_mm.default
                if self._is_aten
                else torch.ops.transformers.grouped_mm_fallback.default
            )
            self._known[key] = self._insert(operator, rows, matrices, offsets)
        return self._known[key]

    def _outer(self, left: fx.Node, right: fx.Node, like: _Stack, offsets: fx.Node) -> fx.Node:
        """``left' right`` for each expert; ``like`` has its shape."""
        if self._is_aten:
            columns = self._insert(_aten.permute.default, left, [1, 0])
            return self._insert(_aten._grouped_mm.default, columns, right, offsets)
        operator = torch.ops.transformers.grouped_mm_fallback_backward.default
        both = self._insert(operator, left, self._written(like), offsets, right)
        return self._insert(getitem, both, 1)

    def _written(self, stack: _Stack) -> fx.Node:
        return transpose(self._insert, stack.node) if stack.turned else stack.node
