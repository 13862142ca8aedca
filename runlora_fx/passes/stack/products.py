"""Products: the matrix products of a joint graph that may be stacked, and what holds of them.

Example: ``mm(view(x), permute(m))`` is a product of the matrices x and m', in the forward.

Invariant: what is answered here holds of the graph as it came to this room; nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.context import Context
from runlora_fx.passes.emit.nodes.inserter import SAVED
from runlora_fx.passes.emit.nodes.layout import takes_any_layout
from runlora_fx.passes.levels.operators import VIEWS, is_pointwise, readers_of
from runlora_fx.passes.levels.sizes import dim_of, example_of, facts_of, numel, shape_of
from runlora_fx.passes.read.gradients import gradient_nodes
from runlora_fx.passes.read.phases import Phases
from runlora_fx.passes.stack.matrices import (
    Matrix,
    base_of,
    is_matrix,
    itemsize,
    matrix_of,
    shown,
    transposed_of,
)

_aten = torch.ops.aten

#: What Inductor computes into memory that it is given: a part of a larger buffer as well.
_INTO_GIVEN = (_aten.mm.default, _aten.addmm.default)

#: The key of the metadata that numbers checkpoints.
_CHECKPOINT = "ac_graph_id"

#: Sizes, strides and storage offset of a tensor.
_Layout: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], int]

#: The first of the primes, counted from 2, that stand for symbolic sizes where views are tried.
_FIRST_PRIME = 169  # 1009

#: Rows of a matrix begin at multiples of so many bytes, or libraries read them slowly [B].
_ALIGNED = 16


@dataclass(frozen=True)
class Product:
    """A product of two matrices.

    Attributes:
        node: The call.
        left: The left operand.
        right: The right operand.
        is_gradient: True if it depends on incoming gradients, and so runs in the backward.
        size: What the result takes in memory; symbolic sizes are those of tracing [B].
    """

    node: fx.Node
    left: Matrix
    right: Matrix
    is_gradient: bool
    size: int


class Products:
    """The products of a graph.

    Attributes:
        effects: The effects of the nodes.
        order: The places of all nodes.
    """

    def __init__(self, context: Context) -> None:
        """Read the products of a joint graph."""
        self._graph = context.graph
        self._hint = context.hint
        self.effects = context.effects()
        self._gradients = gradient_nodes(context.graph)
        self._phases = Phases(context.graph, self._gradients, self.effects)
        self.order = {node: i for i, node in enumerate(context.graph.nodes)}
        self._may_be_strided: dict[tuple[fx.Node, tuple[Dim, int]], bool] = {}
        self._numbers: dict[sympy.Basic, sympy.Integer] = {}
        self._shown: dict[Hashable, _Layout | None] = {}
        self._results = set(context.graph.output_node().all_input_nodes)
        self._run_again = self._found_run_again()
        found = (self._read(n) for n in context.graph.nodes if n.target is _aten.mm.default)
        self.all = [product for product in found if product is not None]

    def _read(self, node: fx.Node) -> Product | None:
        given = (x if isinstance(x, fx.Node) else None for x in node.args)
        left, right = (None if x is None else matrix_of(x, self._hint) for x in given)
        facts = facts_of(node)
        if left is None or right is None or facts is None or not facts.is_plain:
            return None
        if any(self.effects.is_overwritten(m.node) for m in (left, right)):
            return None
        size = self._hint(numel(facts.shape)) * itemsize(node)
        return Product(node, left, right, node in self._gradients, size)

    def are_alike(self, some: Collection[Product]) -> bool:
        """True if products may become one.

        The user tagged none of them to be saved, and all of them alike. They run in one mode, and
        in the same one of forward and backward. A checkpoint recomputes all of them or none: what
        no gradient reads, such as its last product, would be recomputed with the others.
        """
        tags = {product.node.meta.get("recompute") for product in some}
        modes = {self.effects.mode_of(product.node) for product in some}
        phases = {product.is_gradient for product in some}
        again = {product.node in self._run_again for product in some}
        is_one = len(tags) == len(modes) == len(phases) == len(again) == 1
        return is_one and tags.isdisjoint(SAVED)

    def _found_run_again(self) -> set[fx.Node]:
        """The nodes of checkpoints that the backward runs again: it reads what is made of them."""
        found = set[fx.Node]()
        for node in reversed(self._graph.nodes):
            readers = [user for user in node.users if user.op != "output"]
            here = node.meta.get(_CHECKPOINT)
            # What another checkpoint begins with is saved.
            is_saved = any(user.meta.get(_CHECKPOINT, here) != here for user in readers)
            if (
                node.meta.get("recompute") is not None
                and not is_saved
                and any(user in found or self._phases.runs_backward(user) for user in readers)
            ):
                found.add(node)
        return found

    def is_gradient(self, node: fx.Node) -> bool:
        """True if a node depends on incoming gradients."""
        return node in self._gradients

    # -- operands ------------------------------------------------------------------------------

    def is_written_in_place(self, matrix: Matrix, *, is_gradient: bool) -> bool:
        """True if Inductor computes a matrix into its place in a larger one, without a copy.

        Args:
            matrix: The matrix.
            is_gradient: True if the larger one is needed in the backward.
        """
        views, made = shown(matrix.node), matrix.node
        for made in views:
            if made is not matrix.node and len(made.users) > 1:
                return False
            if made in self._results:
                return False
        target = made.target
        if not isinstance(target, torch._ops.OpOverload) or self.effects.is_random(made):
            return False
        is_given = made is matrix.node and target in _INTO_GIVEN
        if not (is_given or is_pointwise(target) or target is _aten.clone.default):
            return False
        # What the forward keeps for the backward lies by itself.
        is_again = made.meta.get("recompute") is not None or self.is_of_inputs(made)
        in_backward = made in self._gradients
        is_read_there = any(map(self._phases.runs_backward, matrix.node.users))
        return in_backward or is_again or not (is_gradient or is_read_there)

    def is_pointwise(self, matrix: Matrix, *, is_gradient: bool) -> bool:
        """True if a pointwise operator makes a matrix, in the phase in which a larger one is made.

        Its kernel writes it into the larger one as well, without reading anything for that.
        """
        *_, made = (matrix.node, *shown(matrix.node))
        is_there = self._phases.runs_backward(made) == is_gradient
        return is_there and is_pointwise(made.target) and not self.effects.is_random(made)

    def is_of_inputs(self, node: fx.Node) -> bool:
        """True if the backward alone makes a tensor, by one pointwise operator, of inputs."""
        if not is_pointwise(node.target) or not self._phases.runs_backward(node):
            return False
        given = node.all_input_nodes
        return all(
            is_matrix(x) and base_of(transposed_of(x) or x).op == "placeholder" for x in given
        )

    def depends(self, on: Iterable[fx.Node], nodes: Iterable[fx.Node]) -> bool:
        """True if one of some nodes is computed of one of others."""
        targets = set(on)
        if not targets:
            return False
        first = min(self.order[node] for node in targets)
        pending, seen = list(nodes), set[fx.Node]()
        while pending:
            node = pending.pop()
            for given in node.all_input_nodes:
                if given in targets:
                    return True
                if given not in seen and self.order[given] > first:
                    seen.add(given)
                    pending.append(given)
        return False

    # -- results -------------------------------------------------------------------------------

    def is_kept(self, node: fx.Node) -> bool:
        """True if the backward reads a result of the forward, as it is or in another shape."""
        if node in self._gradients:
            return False
        return any(map(self._phases.runs_backward, readers_of(node)))

    def may_be_strided(self, node: fx.Node, strides: tuple[Dim, int]) -> bool:
        """True if all that reads a result takes it with other strides, also in other shapes."""
        key = (node, strides)
        if key not in self._may_be_strided:
            sizes = tuple(map(self._number, shape_of(node)))
            layout = (sizes, tuple(map(self._number, strides)), 0)
            self._may_be_strided[key] = node not in self._results and self._are_taken(node, layout)
        return self._may_be_strided[key]

    def _are_taken(self, node: fx.Node, layout: _Layout) -> bool:
        for user in node.users:
            target = user.target
            if not isinstance(target, torch._ops.OpOverload):
                return False
            if target in VIEWS:
                tensors = [x for x in user.all_input_nodes if example_of(x) is not None]
                if user in self._results or tensors != [node] or user.kwargs:
                    return False
                asked = fx.map_arg(user.args[1:], lambda x: self._number(dim_of(x.meta["val"])))
                shows = self._shown_by(target, layout, asked)
                if shows is None or not self._are_taken(user, shows):
                    return False
            elif not takes_any_layout(target):
                return False
        return True

    def _number(self, size: Dim) -> int:
        """A size, with a large prime for every symbol: none is 1, or equal to another by chance."""
        if isinstance(size, int):
            return size
        for symbol in size.free_symbols:
            prime = sympy.prime(_FIRST_PRIME + len(self._numbers))
            self._numbers.setdefault(symbol, sympy.Integer(prime))
        return int(size.xreplace(self._numbers))

    def _shown_by(
        self, view: Callable[..., Any], layout: _Layout, args: tuple[Any, ...]
    ) -> _Layout | None:
        """What a view shows of a tensor; None if there is no such view. Equal layers ask alike."""
        key = (view, layout, str(args))
        if key not in self._shown:
            sizes, strides, offset = layout
            with torch.no_grad():
                whole = torch.empty(0, device="meta").as_strided(sizes, strides, offset)
                try:
                    shows = view(whole, *args)
                    self._shown[key] = (tuple(shows.shape), shows.stride(), shows.storage_offset())
                except RuntimeError:
                    self._shown[key] = None
        return self._shown[key]

    def views(self, node: fx.Node) -> list[fx.Node]:
        """What shows a node in other shapes, each behind what it shows."""
        found: list[fx.Node] = []
        for user in node.users:
            if user.target in VIEWS and user.args[0] is node:
                found += [user, *self.views(user)]
        return found


def may_be_joined(node: fx.Node, dim: int) -> bool:
    """True if others may follow a matrix along a dimension.

    Its size is a number there. What follows it in its rows begins where libraries read it fast.
    """
    size = shape_of(node)[dim]
    return isinstance(size, int) and (dim == 0 or size * itemsize(node) % _ALIGNED == 0)
