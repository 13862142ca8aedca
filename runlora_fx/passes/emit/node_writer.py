"""Nodes: one call at a time, with metadata, and never the same call twice.

    mm(x, w) written in front of a root      ->      the product that stands before it already, or a
                                                     new node with the metadata of the root

Invariant: what is written stands behind what it reads, and in front of the root.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any, cast

import torch
from torch import fx

from runlora_fx._torch_compat import fake_like, is_sym_int
from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.emit.nodes import Inserter
from runlora_fx.passes.emit.recording import Call, Recording
from runlora_fx.passes.emit.rules import Rule, name_in, text_of
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
    """A plan cannot be written into this graph."""


class NodeWriter:
    """Writes nodes in front of an anchor, which lends them its metadata.

    Attributes:
        own: All that was written.
        rule: What is written for.
        recording: What takes down what is written, if anything.
    """

    def __init__(self, graph: fx.Graph, reader: GraphReader, calls: Calls) -> None:
        """Write into the graph that the reader has read."""
        self._insert = Inserter(graph)
        self._reader = reader
        self._calls = calls
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self.own: set[fx.Node] = set()
        self.rule: Rule = ()
        self.recording: Recording | None = None

    def move_to(self, anchor: fx.Node) -> None:
        """Write in front of this node from now on."""
        self._insert.move_to(anchor)

    @contextmanager
    def making(self, rule: Rule) -> Iterator[None]:
        """A context in which nodes are written for a step, and say so in their metadata."""
        outer = self.rule, self._insert.rule
        root = self.anchor.name
        self.rule = rule
        self._insert.rule = text_of(rule, lambda name: name_in(self._reader.leaves, name, root))
        try:
            yield
        finally:
            self.rule, self._insert.rule = outer

    @property
    def written(self) -> list[fx.Node]:
        """The nodes made so far, in order."""
        return self._insert.written

    @property
    def mode(self) -> Any:
        """The fake mode that example values live in; None where they are real."""
        return self._insert.mode

    @property
    def anchor(self) -> fx.Node:
        """The node in front of which nodes are written."""
        return self._insert.anchor

    def is_before(self, node: fx.Node) -> bool:
        """Whether a node stands before what is written now."""
        return self._position[node] < self._position[self.anchor]

    # -- calls ---------------------------------------------------------------------------------

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Any call that computes a tensor from others; an equal one that stands before it."""
        known = self.find(target, args, kwargs)
        node = known or self._placed(self._insert(target, *args, **kwargs))
        if known is None:
            self._reader.classify(node)
        if self.recording is not None:
            found = None if known is None else known in self.own
            self.recording.called(target, args, kwargs, node, self.rule, found)
        return node

    def attribute(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """The node that reads an attribute of the graph's module."""
        self.forget()
        return self._placed(self._insert.attribute(name, tensor))

    def again(
        self, call: Call, args: tuple[Any, ...], base: torch.Tensor | None, rule: str
    ) -> fx.Node:
        """A call that was made for an equal root.

        Args:
            call: The call as it was made.
            args: Its arguments.
            base: What the result is a view of, if it is one.
            rule: What it is written for.
        """
        self._insert.rule = rule
        value = fake_like(call.value, call.layout.shape, call.layout.strides, base)
        return self._placed(self._insert.known(call.target, args, call.kwargs, value))

    def find(self, target: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> fx.Node | None:
        """The node before what is written now that makes this very call."""
        return self._reader.values.find(target, args, kwargs, self.is_before)

    def forget(self) -> None:
        """Have nothing remembered of what is written now."""
        if self.recording is not None:
            self.recording.spoil()

    def _placed(self, node: fx.Node) -> fx.Node:
        # After the anchor's operands and before the anchor: as early as anything written here.
        self._position[node] = self._position[self.anchor] - 1
        self._reader.values.of(node)
        self.own.add(node)
        return node

    # -- sizes ---------------------------------------------------------------------------------

    def _sizes(self, shape: Shape) -> list[int | fx.Node]:
        """The arguments of a view: -1 for a size that follows from the others."""
        if any(map(is_zero, shape)):  # any size would follow
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
        """A size, or a node that holds it: from the graph, or from a tensor that has it."""
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
