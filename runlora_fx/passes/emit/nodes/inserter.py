"""Insertion: write operator calls into a graph, with metadata and example values.

    insert(clone, y)      ->      a node "clone" in front of the anchor, with a tensor in its meta

Invariant: every inserted node has an example value, and the name of the rule that it was written
for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from runlora_fx._torch_compat import COPIED_META, fake_mode_of
from runlora_fx.passes.emit.nodes.example_results import ExampleResults
from runlora_fx.passes.levels.operators import VIEWS

#: The beginning of the names of all nodes that are written.
PREFIX = "runlora_"

#: The names of views, whatever they are written for, and of nodes that no rule names.
_VIEW, _UNNAMED = f"{PREFIX}view", f"{PREFIX}value"

#: By identity, because the hash of an operator is a call of Python code.
_VIEWS = frozenset(map(id, VIEWS))

#: The key of the metadata that names the step or law that a node was written for.
RULE = "runlora"

#: The tags by which a user's checkpoint policy asks to save a result for the backward.
SAVED = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)


class Inserter:
    """Writes calls in front of one node, the anchor. They get a copy of its metadata.

    Attributes:
        written: The nodes written so far, in order.
        rule: The rule that the nodes are written for: their ``meta["runlora"]``.
        label: What the nodes are called; fx adds a number where a name is taken.
        mode: The fake mode of the example tensors; None if they are real.
    """

    def __init__(self, graph: fx.Graph, rule: str = "") -> None:
        """Write into a graph whose tensor nodes have example tensors in ``meta["val"]``."""
        self.rule = rule
        self.label = label_of(rule)
        self._graph = graph
        self._anchor: fx.Node | None = None
        self._lent: dict[str, Any] = {}
        self.mode = fake_mode_of(node.meta.get("val") for node in graph.nodes)
        self._results = ExampleResults(self.mode)
        self.written: list[fx.Node] = []

    @property
    def anchor(self) -> fx.Node:
        """The node in front of which calls are written."""
        assert self._anchor is not None, "move_to() comes first"
        return self._anchor

    def move_to(self, anchor: fx.Node) -> None:
        """Write in front of this node from now on."""
        self._anchor = anchor
        self._lend(anchor)

    def move_behind(self, node: fx.Node) -> None:
        """Write behind this node from now on, with its metadata."""
        self._anchor = node.next
        self._lend(node)

    def _lend(self, node: fx.Node) -> None:
        self._lent = {name: node.meta[name] for name in COPIED_META if name in node.meta}
        if self._lent.get("recompute") in SAVED:
            del self._lent["recompute"]  # the user saves this result, not what it is made of

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Write one call."""
        # Computed before the node is made: a call that fails leaves nothing in the graph.
        return self.known(target, args, kwargs, self._results(target, args, kwargs))

    def known(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        value: Any,
        name: str | None = None,
    ) -> fx.Node:
        """Write one call whose example value is known.

        Args:
            target: What is called.
            args: Its arguments.
            kwargs: Its keyword arguments.
            value: The example value.
            name: The name of a node that was written for an equal step.
        """
        if name is None:
            name = _VIEW if id(target) in _VIEWS else self.label
        with self._graph.inserting_before(self.anchor):
            node = self._graph.create_node("call_function", target, args, kwargs, name)
        return self._described(node, value)

    def attribute(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """Write the ``get_attr`` node of an attribute of the graph's module."""
        value = tensor if self.mode is None else self.mode.from_tensor(tensor, static_shapes=True)
        with self._graph.inserting_before(self.anchor):
            node = self._graph.get_attr(name)
        return self._described(node, value)

    def _described(self, node: fx.Node, value: Any) -> fx.Node:
        """Give a new node its metadata, and return it."""
        meta = node.meta
        meta.update(self._lent)
        meta["val"] = value
        if self.rule:
            meta[RULE] = self.rule
        self.written.append(node)
        return node


def label_of(rule: str) -> str:
    """What nodes are called that are written for a rule: the step class before its colon.

    Example:
        ``"sum by expert: ..."`` becomes ``runlora_sum_by_expert``.
    """
    kind, colon, _ = rule.partition(":")
    return f"{PREFIX}{kind.replace(' ', '_')}" if colon else _UNNAMED


def hand_over(old: fx.Node, new: fx.Node) -> None:
    """Replace all uses of a node by another. A tag that saves the old one passes to the new one."""
    tag = old.meta.get("recompute")
    if tag in SAVED:
        new.meta.setdefault("recompute", tag)
    old.replace_all_uses_with(new)
