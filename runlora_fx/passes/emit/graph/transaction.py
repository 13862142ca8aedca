"""Transactions: a graph is changed wholly, or it is as it came.

    with transaction(graph):
        ...                     # insert, replace, erase, set metadata: anything
        raise RuntimeError      # the graph is as it was when the block began

A block that ends well leaves a graph that lints. Nodes that survive an undone block are the same
objects as before it; nodes that were erased in it are made again under their names.

Invariant: after a block there is no graph half changed, whatever was raised in it and wherever.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import fx

from runlora_fx.passes.context import Context, Failure

_log = logging.getLogger("runlora_fx")


class _Record(NamedTuple):
    """A node as it was; what else it is, it remains, even where it is erased."""

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    meta: dict[str, Any]


class Snapshot:
    """The nodes of a graph at one moment: what they compute, in which order, and their metadata.

    Attributes:
        nodes: The nodes, in order.
    """

    def __init__(self, graph: fx.Graph) -> None:
        """Take note of a graph."""
        self._graph = graph
        self.nodes = tuple(graph.nodes)
        self._records = [_Record(n, n.args, n.kwargs, n.name, n.meta.copy()) for n in self.nodes]

    def has_changed(self) -> bool:
        """Whether some node is new, gone, or reads something else."""
        nodes = tuple(self._graph.nodes)
        return nodes != self.nodes or any(
            node.args is not was.args and _read(node.args) != _read(was.args)
            for node, was in zip(nodes, self._records, strict=True)
        )

    def restore(self) -> None:
        """Make the graph what it was."""
        alive = set(self._graph.nodes)
        now: dict[fx.Node, fx.Node] = {}
        before: fx.Node | None = None
        for was in self._records:
            node = was.node if was.node in alive else self._made_again(was, before)
            if before is not None and node.prev is not before:
                before.append(node)  # it was moved
            now[was.node] = before = node
        for was in self._records:
            node = now[was.node]
            node.args = fx.node.map_arg(was.args, lambda n: now[n])
            node.kwargs = fx.node.map_arg(was.kwargs, lambda n: now[n])
            node.meta = was.meta
        kept = set(now.values())
        for node in reversed(list(self._graph.nodes)):
            if node not in kept:
                self._graph.erase_node(node)
        for was in self._records:
            now[was.node].name = was.name  # free again: whatever had it meanwhile is gone

    def _made_again(self, was: _Record, before: fx.Node | None) -> fx.Node:
        """A node that was erased; it reads nothing yet."""
        at = self._graph.inserting_before(next(iter(self._graph.nodes)))
        with at if before is None else self._graph.inserting_after(before):
            gone = was.node
            return self._graph.create_node(gone.op, gone.target, name=was.name, type_expr=gone.type)


def _read(args: Any) -> list[fx.Node]:
    """The nodes among arguments, in order."""
    found: list[fx.Node] = []
    fx.node.map_arg(args, found.append)
    return found


def note_failure(context: Context, names: Sequence[str], error: Exception) -> None:
    """Log that a part of a graph is left as it came, and add it to the context's failures."""
    _log.warning(
        "runlora leaves %s as it came; please report this "
        "(options={'runlora.strict': True} raises instead): %s: %s",
        ", ".join(names),
        type(error).__name__,
        error,
        exc_info=_log.isEnabledFor(logging.DEBUG),
    )
    context.failures.append(Failure(tuple(names), error))


@contextmanager
def transaction(graph: fx.Graph, as_it_is: Snapshot | None = None) -> Iterator[None]:
    """A context in which a graph is changed wholly or not at all.

    Args:
        graph: The graph.
        as_it_is: What was noted of the graph, if nothing was changed since.

    Raises:
        Exception: Whatever is raised inside, and what ``graph.lint()`` finds at the end; the graph
            is then as it was.
    """
    snapshot = Snapshot(graph) if as_it_is is None else as_it_is
    try:
        yield
        if snapshot.has_changed():
            graph.lint()
    except BaseException:
        snapshot.restore()
        raise
