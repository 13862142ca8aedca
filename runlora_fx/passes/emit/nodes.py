"""Insertion: operator calls written into a graph, with metadata and example values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from runlora_fx._torch_compat import COPIED_META, fake_mode_of, in_fake_mode


class Inserter:
    """Writes calls in front of an anchor, which lends them its metadata.

    Attributes:
        written: The nodes made so far, in order.
    """

    def __init__(self, graph: fx.Graph) -> None:
        """Write into a graph whose tensor nodes have example tensors in ``meta["val"]``."""
        self._graph = graph
        self._anchor: fx.Node | None = None
        self.mode = fake_mode_of(node.meta.get("val") for node in graph.nodes)
        self.written: list[fx.Node] = []

    @property
    def anchor(self) -> fx.Node:
        """The node in front of which calls are written."""
        assert self._anchor is not None, "move_to() comes first"
        return self._anchor

    def move_to(self, anchor: fx.Node) -> None:
        """Write in front of this node from now on."""
        self._anchor = anchor

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Write one call."""
        anchor = self.anchor
        # Computed before the node is made: a call that fails leaves nothing in the graph.
        with in_fake_mode(self.mode), torch.no_grad():
            value = target(*values_of(args), **values_of(kwargs))
        with self._graph.inserting_before(anchor):
            node = self._graph.call_function(target, args, kwargs)
        node.meta = {name: anchor.meta[name] for name in COPIED_META if name in anchor.meta}
        node.meta["val"] = value
        self.written.append(node)
        return node

    def erase(self) -> None:
        """Take back everything that was written."""
        for node in reversed(self.written):
            self._graph.erase_node(node)
        self.written = []


def values_of(x: Any) -> Any:
    """Arguments with the nodes' example values in their places."""
    return fx.node.map_arg(x, lambda node: node.meta["val"])
