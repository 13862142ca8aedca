"""Phases: which nodes of a joint graph run in the forward, and which in the backward.

    mean = x.mean(0)
    copy_(running_mean, mean)     ->      the forward runs all three, though no output needs
    y = x - mean                          the second

Invariant: a node that needs no gradient runs in the forward if an output of the forward is made of
it, or something that the forward writes to memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from runlora_fx._torch_compat import must_run_backward
from runlora_fx.passes.read.effects import Effects
from runlora_fx.passes.read.reader import GraphReader


class Phases:
    """The phase of every node, and the tensors that the backward may use.

    An inference graph has no incoming gradients, so all its nodes are of the forward.
    """

    def __init__(self, graph: fx.Graph, gradients: Collection[fx.Node], effects: Effects) -> None:
        """Find the phases of a graph's nodes.

        Args:
            graph: The graph.
            gradients: The nodes that an incoming gradient reaches.
            effects: What the nodes do besides computing a value.
        """
        self.gradients = gradients
        outputs = [arg for node in graph.find_nodes(op="output") for arg in node.all_input_nodes]
        written = [node for node in effects.writing if not must_run_backward(node)]
        self.is_joint = bool(self.gradients)
        self._forward = _ancestors(
            node for node in (*outputs, *written) if node not in self.gradients
        )

    def runs_backward(self, node: fx.Node) -> bool:
        """True if the backward runs the node: it needs gradients, or nothing else needs it."""
        return self.is_joint and (node in self.gradients or node not in self._forward)

    def held(self, reader: GraphReader, node: fx.Node) -> bool:
        """True if the backward can use a tensor without saving more memory.

        True for inputs of the graph, for values that the backward computes, and for tensors that
        the incoming backward uses already.
        """
        equal = reader.values.equals(node)
        if node.op in ("placeholder", "get_attr") or any(map(self.runs_backward, equal)):
            return True
        pending, seen = [user for same in equal for user in same.users], set()
        while pending:
            user = pending.pop()
            if user in seen:
                continue
            seen.add(user)
            form = reader.forms.get(user)
            if form is not None and form.carries_source:
                pending.extend(user.users)
            elif self.runs_backward(user) and user.op != "output":
                return True
        return False


def recomputed(node: fx.Node) -> bool:
    """True if activation checkpointing makes the backward compute the node again."""
    return node.meta.get("recompute") in (
        CheckpointPolicy.MUST_RECOMPUTE,
        CheckpointPolicy.PREFER_RECOMPUTE,
    )


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return seen
