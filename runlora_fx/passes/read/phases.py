"""Phases: what of a joint graph belongs to the forward, what to the backward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from runlora_fx._torch_compat import draws_from_seeds
from runlora_fx.passes.read.gradients import gradient_nodes
from runlora_fx.passes.read.reader import GraphReader

_RANDOM = (torch.ops.aten.rand.default, torch.ops.aten.rand_like.default)
_COMPARISONS = (
    *(torch.ops.aten.gt.Scalar, torch.ops.aten.ge.Scalar),
    *(torch.ops.aten.lt.Scalar, torch.ops.aten.le.Scalar),
)


class Phases:
    """Which nodes need tangents, which the forward needs, and what the backward may use.

    An inference graph has no tangents: everything in it is forward.
    """

    def __init__(self, graph: fx.Graph) -> None:
        """Find the phases of a graph's nodes."""
        self.tangent = gradient_nodes(graph)
        outputs = [
            arg
            for node in graph.nodes
            if node.op == "output"
            for arg in node.all_input_nodes
            if arg not in self.tangent
        ]
        self.is_joint = bool(self.tangent)
        self._forward = _ancestors(outputs)

    def runs_backward(self, node: fx.Node) -> bool:
        """Whether the backward runs the node: it needs tangents, or nothing else needs it."""
        return self.is_joint and (node in self.tangent or node not in self._forward)

    def held(self, reader: GraphReader, node: fx.Node) -> bool:
        """Whether the backward can use a tensor without more being saved for it.

        True for inputs of the graph (held by their owner), for what the backward makes itself, and
        for what the incoming backward uses already.
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
    """Whether activation checkpointing makes the backward compute the node again."""
    return node.meta.get("recompute") in (
        CheckpointPolicy.MUST_RECOMPUTE,
        CheckpointPolicy.PREFER_RECOMPUTE,
    )


def recompute(node: fx.Node) -> None:
    """Make the partitioner have the backward compute a node again."""
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def recompute_dropout_masks(graph: fx.Graph) -> int:
    """Have the backward draw the masks of dropout again, from the seeds that Inductor keeps.

    Inductor replaces random operators by functions of a seed; what compares their numbers with the
    probability is then as cheap to compute again as any elementwise operation. Operators that use
    the generator's state instead are left alone.

    Returns:
        The number of masks.
    """
    if not draws_from_seeds():
        return 0
    found = 0
    for node in graph.nodes:
        if node.target not in _RANDOM or node.meta.get("recompute") is not None:
            continue
        readers = list(node.users)
        if readers and all(reader.target in _COMPARISONS for reader in readers):
            for drawn in (node, *readers):
                recompute(drawn)
            found += len(readers)
    return found


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return seen
