"""Results: two results of a graph that were two tensors stay two tensors.

    return x @ w + x @ a @ b, x @ w + x @ a @ b        ->        return y, y.clone()

Two roots of one value are emitted once. Without the copy, a caller who writes to one of the results
would change the other.

Invariant: two results share memory with each other, or one with an input, only if they did in the
incoming graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from runlora_fx.passes.emit.nodes.inserter import Inserter
from runlora_fx.passes.read.effects import Effects
from runlora_fx.passes.read.memory import Memories, Memory


def results_of(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that a graph returns, in order; a node that is returned twice is in it twice."""
    found: list[fx.Node] = []

    def see(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(graph.output_node().args, see)
    return found


def memory_of_results(graph: fx.Graph, effects: Effects) -> list[frozenset[Memory]]:
    """The memory that each result of a graph may lie in."""
    return [effects.memory_of(node) for node in results_of(graph)]


def keep_results_apart(
    graph: fx.Graph, before: list[frozenset[Memory]], clone: Callable[..., Any]
) -> int:
    """Copy, in place, the results that share memory only since the graph was rewritten.

    Args:
        graph: The rewritten graph.
        before: :func:`memory_of_results` of the graph as it came.
        clone: The operator that copies a tensor.

    Returns:
        The number of copies.
    """
    memories = Memories(graph.owning_module, set(graph.nodes))
    results = results_of(graph)
    inputs = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    given = frozenset[Memory]().union(*map(memories.of, inputs))
    first: dict[Memory, int] = {}
    shared: list[int] = []
    for i, node in enumerate(results):
        memory = memories.of(node)
        others = {first[m] for m in memory if m in first}
        is_given = not memory.isdisjoint(given) and before[i].isdisjoint(given)
        if is_given or any(before[i].isdisjoint(before[j]) for j in others):
            shared.append(i)
            continue
        for m in memory:
            first.setdefault(m, i)
    if shared:
        _copy(graph, shared, clone)
    return len(shared)


def _copy(graph: fx.Graph, which: list[int], clone: Callable[..., Any]) -> None:
    """Make a graph return copies of some results, given by their places."""
    insert, output = Inserter(graph, "copy: two results lie apart"), graph.output_node()
    insert.move_to(output)
    place = iter(range(len(results_of(graph))))

    def copied(node: fx.Node) -> fx.Node:
        return insert(clone, node) if next(place) in which else node

    output.args = fx.node.map_arg(output.args, copied)
