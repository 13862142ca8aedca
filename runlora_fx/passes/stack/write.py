"""Writing: stacks are put into a graph, and proven.

    mm(x, permute(m)), mm(x, permute(a))   ->   mm(x, permute(cat([m, a]))), slice, slice

Invariant: what takes the place of a product is the same sum of products of the same blocks. Every
node stands behind what it reads, and what is random or writes to memory stays in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import fx

from runlora_fx.passes.context import Context
from runlora_fx.passes.emit.graph.recompute import keep, recompute
from runlora_fx.passes.emit.nodes.example_results import ExampleResults
from runlora_fx.passes.emit.nodes.inserter import Inserter, label_of
from runlora_fx.passes.emit.proof.verify import VerificationError
from runlora_fx.passes.levels.sizes import facts_of, same_strides
from runlora_fx.passes.stack.blocks import blocks_of
from runlora_fx.passes.stack.find import Added, Joined, Shared
from runlora_fx.passes.stack.matrices import length_of
from runlora_fx.passes.stack.products import Products

_aten = torch.ops.aten


class StackWriter:
    """Writes the stacks of a graph."""

    def __init__(self, context: Context, products: Products) -> None:
        """Write into the graph whose products were read."""
        self._graph = context.graph
        self._products = products
        self._insert = Inserter(context.graph)
        self._examples = ExampleResults(self._insert.mode)
        self._buffers: dict[int, fx.Node] = {}
        self._again: list[fx.Node] = []
        self._replaced: list[fx.Node] = []
        self._now: dict[fx.Node, fx.Node] = {}

    def write(self, stacks: Sequence[Shared | Added]) -> None:
        """Write stacks in their order, inside a transaction of the caller's.

        Raises:
            VerificationError: If what was written is not what it replaces.
        """
        for stack in stacks:
            if isinstance(stack, Shared):
                self._write_shared(stack)
            else:
                self._write_added(stack)
        self._erase_replaced()
        recompute(self._again, self._insert.written)
        self._sort()

    # -- the two kinds -------------------------------------------------------------------------

    def _write_shared(self, stack: Shared) -> None:
        nodes = [product.node for product in stack.products]
        expected = [blocks_of(node) for node in nodes]
        last = max(nodes, key=self._products.order.__getitem__)
        self._begin(last, f"stack: {len(nodes)} products that read the same tensor")
        left, right = nodes[0].args
        other = self._operand(stack.others, stack.turned)
        operands = (left, other) if stack.side == "left" else (other, right)
        made = self._insert(_aten.mm.default, *operands)
        dim, at = (1 if stack.side == "left" else 0), 0
        for node, copied, was in zip(nodes, stack.copied, expected, strict=True):
            size = length_of(node, dim)
            part = self._insert(_aten.slice.Tensor, made, dim, at, at + size)
            is_kept = self._products.is_kept(node)
            if is_kept and not copied:  # what it is a part of is kept
                self._again.append(part)
            if copied:
                part = self._insert(
                    _aten.clone.default, part, memory_format=torch.contiguous_format
                )
                if is_kept:
                    keep([part])
            self._prove(node, part, was)
            self._replace(node, part)
            at += size

    def _write_added(self, stack: Added) -> None:
        root, was = stack.root, blocks_of(stack.root)
        self._begin(root, f"stack: {len(stack.products)} products that are added up")
        left, right = self._operand(*stack.lefts), self._operand(*stack.rights)
        made = self._insert(_aten.mm.default, left, right)
        for addend in stack.rest:
            made = self._insert(_aten.add.Tensor, made, self._now.get(addend, addend))
        self._prove(root, made, was)
        self._replace(root, made)

    # -- operands ------------------------------------------------------------------------------

    def _operand(self, joined: Joined, turned: bool) -> fx.Node:
        """Joined matrices, or the transpose of them."""
        node = self._buffer(joined) if joined.within is None else self._cut(joined, joined.within)
        return self._insert(_aten.permute.default, node, [1, 0]) if turned else node

    def _buffer(self, joined: Joined) -> fx.Node:
        """The buffer, of which all that reads its parts now reads slices."""
        parts = [self._now.get(part.node, part.node) for part in joined.parts]
        node = self._insert(_aten.cat.default, parts, joined.dim)
        self._buffers[id(joined)] = node
        if joined.is_gradient and not any(map(self._is_gradient, parts)):
            self._again.append(node)
        as_they_came = (part for part in parts if part in self._products.order)
        self._again += filter(self._products.is_of_inputs, as_they_came)
        at = 0
        for part, is_in_place in zip(parts, joined.in_place, strict=True):
            size = length_of(part, joined.dim)
            readers = [
                user
                for user in part.users
                if user is not node and self._is_gradient(user) == joined.is_gradient
            ]
            if is_in_place and readers:
                piece = self._insert(_aten.slice.Tensor, node, joined.dim, at, at + size)
                if joined.is_gradient:
                    self._again.append(piece)
                for reader in readers:
                    reader.replace_input_with(part, piece)
                self._refresh(piece)
            at += size
        return node

    def _is_gradient(self, node: fx.Node) -> bool:
        """True if a node runs in the backward; of one that was written, all that reads it does."""
        if node in self._products.order:
            return self._products.is_gradient(node)
        return any(self._is_gradient(user) for user in node.users)

    def _cut(self, joined: Joined, within: Joined) -> fx.Node:
        """The part of a buffer in which some matrices follow each other."""
        first = [part.node for part in within.parts].index(joined.parts[0].node)
        begin = sum(length_of(part.node, within.dim) for part in within.parts[:first])
        size = sum(length_of(part.node, within.dim) for part in joined.parts)
        piece = self._insert(
            _aten.slice.Tensor, self._buffers[id(within)], within.dim, begin, begin + size
        )
        if within.is_gradient:
            self._again.append(piece)
        return piece

    # -- the graph -----------------------------------------------------------------------------

    def _begin(self, anchor: fx.Node, rule: str) -> None:
        self._insert.rule, self._insert.label = rule, label_of(rule)
        self._insert.move_to(anchor)

    def _prove(self, old: fx.Node, new: fx.Node, expected: object) -> None:
        was, now = facts_of(old), facts_of(new)
        is_like = was is not None and now is not None and was == now
        if not is_like or blocks_of(new) != expected:
            raise VerificationError(f"{old.name}: what was stacked is not what it replaces")

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)
        if not same_strides(old, new):
            self._refresh(new)
        self._replaced.append(old)
        self._now[old] = new

    def _refresh(self, node: fx.Node) -> None:
        """Have the views of a node show the strides that it has."""
        for view in self._products.views(node):
            view.meta["val"] = self._examples(
                cast(Callable[..., Any], view.target), view.args, view.kwargs
            )

    def _erase_replaced(self) -> None:
        """Take out what was replaced, and what only it read."""
        pending, gone = self._replaced[::-1], set[fx.Node]()
        while pending:
            node = pending.pop()
            if node not in gone and not node.users and node.op == "call_function":
                gone.add(node)
                given = node.all_input_nodes
                self._graph.erase_node(node)
                pending += given

    def _sort(self) -> None:
        """Put every node behind what it reads, and otherwise leave the order as it is.

        Raises:
            VerificationError: If there is no such order, or nodes with effects would change theirs.
        """
        before = list(self._graph.nodes)
        after = list(_sorted(before))
        effects = self._products.effects
        acts = [node for node in before if effects.is_random(node) or effects.writes(node)]
        acting = set(acts)
        if [node for node in after if node in acting] != acts:
            raise VerificationError("stacks would reorder nodes that have effects")
        for previous, node in pairwise(after):
            if node.prev is not previous:
                previous.append(node)


def _sorted(nodes: Iterable[fx.Node]) -> Iterable[fx.Node]:
    """Nodes, each behind what it reads."""
    done: set[fx.Node] = set()
    for node in nodes:
        pending: list[tuple[fx.Node, bool]] = [(node, False)]
        open_: set[fx.Node] = set()
        while pending:
            current, is_read = pending.pop()
            if current in done:
                continue
            if is_read:
                done.add(current)
                yield current
                continue
            if current in open_:
                raise VerificationError(f"{current.name} would be made of itself")
            open_.add(current)
            pending.append((current, True))
            pending += [(given, False) for given in reversed(current.all_input_nodes)]
