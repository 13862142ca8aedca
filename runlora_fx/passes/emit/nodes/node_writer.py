"""Node writer: write one call at a time in front of a root, and reuse equal calls.

    call(mm, x, w)      ->      the node ``mm(x, w)`` that already stands before the root, or else a
                                new one with the metadata of the root

Invariant: a written node stands behind everything that it reads, and in front of the root.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any, cast

import torch
from torch import fx

from runlora_fx._torch_compat import fake_like, is_sym_int
from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.emit.nodes.claims import holds
from runlora_fx.passes.emit.nodes.example_results import Layout
from runlora_fx.passes.emit.nodes.inserter import Inserter, label_of
from runlora_fx.passes.emit.nodes.rules import Rule, name_in, text_of
from runlora_fx.passes.levels.forms import Form
from runlora_fx.passes.levels.level import Calls
from runlora_fx.passes.levels.sizes import (
    Shape,
    dim_of,
    equal,
    example_of,
    factors_of,
    index_of,
    is_zero,
    shape_of,
)
from runlora_fx.passes.read.reader import GraphReader


class EmissionError(RuntimeError):
    """A plan cannot be expressed in this graph."""


class NodeWriter:
    """Writes nodes in front of one node, the anchor. They get a copy of its metadata.

    Attributes:
        own: All nodes that were written.
        rules: The rule that each node was written for. Copied nodes have none here.
        claimed: The nodes whose forms were not read, but given.
    """

    def __init__(self, graph: fx.Graph, reader: GraphReader, calls: Calls) -> None:
        """Write into the graph that the reader has read."""
        self._insert = Inserter(graph)
        self._reader = reader
        self._calls = calls
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self.own: set[fx.Node] = set()
        self.rules: dict[fx.Node, Rule] = {}
        self.claimed: set[fx.Node] = set()
        self._rule: Rule = ()

    def move_to(self, anchor: fx.Node) -> None:
        """Write in front of this node from now on."""
        self._insert.move_to(anchor)

    @contextmanager
    def making(self, rule: Rule) -> Iterator[None]:
        """A context in which nodes are written for one rule. Their metadata names it."""
        outer = self._rule, self._insert.rule, self._insert.label
        root = self.anchor.name
        self._rule = rule
        self._insert.rule = text_of(rule, lambda name: name_in(self._reader.leaves, name, root))
        self._insert.label = label_of(self._insert.rule)
        try:
            yield
        finally:
            self._rule, self._insert.rule, self._insert.label = outer

    @property
    def written(self) -> list[fx.Node]:
        """The nodes written so far, in order."""
        return self._insert.written

    @property
    def mode(self) -> Any:
        """The fake mode of the example values; None if they are real."""
        return self._insert.mode

    @property
    def anchor(self) -> fx.Node:
        """The node in front of which nodes are written."""
        return self._insert.anchor

    def is_before(self, node: fx.Node) -> bool:
        """True if a node stands before the anchor."""
        return self._position[node] < self._position[self.anchor]

    # -- calls ---------------------------------------------------------------------------------

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Write a call, or return the node of an equal call that stands before the anchor."""
        values = self._reader.values
        key = values.key("call_function", target, args, kwargs)
        known = self._known(key)
        if known is not None:
            return known
        node = self._insert(target, *args, **kwargs)
        self.rules[node] = self._rule
        values.add(node, key)
        self._reader.classify(node)
        return self._placed(node)

    def attribute(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """Write the ``get_attr`` node of an attribute of the graph's module."""
        node = self._insert.attribute(name, tensor)
        self._reader.values.of(node)
        return self._placed(node)

    def again(
        self,
        was: fx.Node,
        nodes: Mapping[fx.Node, fx.Node],
        layout: Layout | None,
        base: fx.Node | None,
        rule: str,
    ) -> fx.Node:
        """Write the call of an existing node again, on other arguments.

        Args:
            was: The existing node.
            nodes: For every node that it reads, the one to read instead.
            layout: The layout of the result.
            base: The node that the result is a view of; None if it is new memory.
            rule: The rule that it is written for.
        """
        values, args, kwargs = self._reader.values, _on(nodes, was.args), _on(nodes, was.kwargs)
        key = values.key("call_function", was.target, args, kwargs)
        known = self._known(key)
        if known is not None:
            return known
        assert layout is not None
        memory = None if base is None else base.meta["val"]
        value = fake_like(was.meta["val"], layout.shape, layout.strides, memory)
        self._insert.rule = rule
        node = self._insert.known(cast(Any, was.target), args, kwargs, value, was.name)
        values.add(node, key)
        return self._placed(node)

    def find_again(self, was: fx.Node, nodes: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
        """The node before the anchor that makes an existing node's call on other arguments."""
        args, kwargs = _on(nodes, was.args), _on(nodes, was.kwargs)
        return self._known(self._reader.values.key("call_function", was.target, args, kwargs))

    def _known(self, key: Hashable | None) -> fx.Node | None:
        """The node before the anchor that makes the call of a key, one of ours if there is one.

        Ours stay in the graph. A node of the incoming graph may be erased once its roots are
        replaced, so using it would keep it alive.
        """
        nodes = self._reader.values.known(key)
        found: fx.Node | None = None
        for node in nodes:
            if self.is_before(node):
                if node in self.own:
                    return node
                found = found or node
        return found

    def _placed(self, node: fx.Node) -> fx.Node:
        # All nodes that are written for one anchor share the position directly before it.
        self._position[node] = self._position[self.anchor] - 1
        self.own.add(node)
        return node

    def claim(self, node: fx.Node, form: Form) -> None:
        """Say which form a call has that no reader can tell.

        Raises:
            EmissionError: If the call does not compute it.
        """
        if not holds(node, form, self._calls, self._reader.values):
            raise EmissionError(
                f"{node.name} is written as {type(form).__name__}, which {node.target} on "
                f"{node.args} does not compute"
            )
        self.claimed.add(node)
        self._reader.forms[node] = form

    # -- sizes ---------------------------------------------------------------------------------

    def _sizes(self, shape: Shape) -> list[int | fx.Node]:
        """A shape as arguments of a view, with -1 for a size that follows from the others."""
        if any(map(is_zero, shape)):  # -1 is ambiguous if there are no elements
            return list(map(self._size, shape))
        if self._calls.stacked is not None and len(shape) == 2:
            rows, cols = shape
            if isinstance(cols, int):
                return [-1, cols]
            return [rows, -1] if isinstance(rows, int) else [-1, self._size(cols)]
        unknown = [size for size in shape if not isinstance(size, int)]
        if len(unknown) <= 1:
            return [size if isinstance(size, int) else -1 for size in shape]
        return [size if isinstance(size, int) else self._size(size) for size in shape]

    def _size(self, size: Dim) -> int | fx.Node:
        """A size as an integer, or as a node: a symbolic integer, or ``sym_size`` of a tensor.

        Raises:
            EmissionError: If no tensor before the anchor has the size.
        """
        if isinstance(size, int):
            return size
        limit = self._position[self.anchor]
        tensors: list[tuple[fx.Node, int]] = []
        for node, position in self._position.items():
            if position >= limit:
                continue
            if is_sym_int(node) and equal(dim_of(node.meta["val"]), size):
                return cast(fx.Node, node)
            where = None if example_of(node) is None else index_of(size, shape_of(node))
            if where is not None:
                tensors.append((node, where))
        factors = [] if tensors else factors_of(size)
        if factors:
            first, *others = map(self._size, factors)
            return reduce(lambda a, b: self.call(operator.mul, a, b), others, first)
        if not tensors:
            raise EmissionError(f"no tensor before {self.anchor.name} has the size {size}")
        return self.call(self._calls.size, *tensors[0])


def _on(nodes: Mapping[fx.Node, fx.Node], x: Any) -> Any:
    """Arguments of a call in which every node is replaced by another."""
    return fx.node.map_arg(x, nodes.__getitem__) if x else x
