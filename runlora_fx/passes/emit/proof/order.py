"""Order: what was written reads every tensor in the version that its root reads.

    y = x @ w; x.add_(1); sin(y)      ->      the new ``y`` must stand in front of ``add_`` too

Invariant: in a graph that writes to memory, no written node stands on another side of a write to
what it reads than its root. A graph that writes to none is not walked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from runlora_fx.passes.emit.proof.verify import VerificationError
from runlora_fx.passes.read.effects import Effects


def check_order(
    graph: fx.Graph, effects: Effects, written: Iterable[tuple[fx.Node, Sequence[fx.Node]]]
) -> None:
    """Check where nodes were written.

    Args:
        graph: The graph, with the old roots in place.
        effects: What the incoming nodes do besides computing a value.
        written: Each root with the nodes that were written for it.

    Raises:
        VerificationError: If a node reads memory in another version than its root.
    """
    if not effects.writing:
        return
    came = set(effects.nodes)
    behind: dict[fx.Node, fx.Node] = {}
    next_one = graph.output_node()
    for node in reversed(graph.nodes):
        if node in came:
            next_one = node
        behind[node] = next_one
    for root, nodes in written:
        for node in nodes:
            for given in node.all_input_nodes:
                if given not in came:
                    continue
                if effects.version(given, behind[node]) != effects.version(given, root):
                    raise VerificationError(
                        f"{root.name}: {node.name} reads {given.name} on the other side of a write"
                    )
