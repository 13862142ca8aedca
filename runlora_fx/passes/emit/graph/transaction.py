"""Transactions: a graph is changed completely, or not at all.

    with transaction(graph):
        ...                     # insert, replace, erase, set metadata: anything
        raise RuntimeError      # the graph is restored to what it was when the block began

A block that ends without an exception leaves a graph that passes ``graph.lint()``. When a block is
undone, nodes that still exist stay the same objects. Erased nodes are created again with their old
names.

Invariant: no exception, wherever it is raised, leaves a graph that is half changed.
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
    """The parts of a node that a rewrite may change; ``op`` and ``target`` are not among them."""

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    meta: dict[str, Any]


class Snapshot:
    """A snapshot of a graph: its nodes in order, with their arguments, names and metadata.

    Attributes:
        nodes: The nodes, in order.
    """

    def __init__(self, graph: fx.Graph) -> None:
        """Take a snapshot of a graph."""
        self._graph = graph
        self.nodes = tuple(graph.nodes)
        self._records = [_Record(n, n.args, n.kwargs, n.name, n.meta.copy()) for n in self.nodes]

    def has_changed(self) -> bool:
        """True if a node was added, moved or erased, or reads other nodes."""
        nodes = tuple(self._graph.nodes)
        return nodes != self.nodes or any(
            node.args is not was.args and _read(node.args) != _read(was.args)
            for node, was in zip(nodes, self._records, strict=True)
        )

    def restore(self) -> None:
        """Restore the graph to the snapshot."""
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
        added = [node for node in self._graph.nodes if node not in kept]
        for node in added:
            node.args, node.kwargs = (), {}  # an exception may come while they are out of order
        for node in added:
            self._graph.erase_node(node)
        for was in self._records:
            now[was.node].name = was.name  # nodes that had taken the name are erased by now

    def copied(self) -> fx.Graph:
        """The graph of the snapshot as a new graph; the other one is left as it is now."""
        graph = fx.Graph(owning_module=self._graph.owning_module)
        copies: dict[fx.Node, fx.Node] = {}
        for was in self._records:
            args, kwargs = fx.node.map_arg((was.args, was.kwargs), copies.__getitem__)
            node = was.node
            copy = graph.create_node(node.op, node.target, args, kwargs, was.name)
            copy.meta = was.meta
            copies[node] = copy
        return graph

    def _made_again(self, was: _Record, before: fx.Node | None) -> fx.Node:
        """Create an erased node again, without arguments."""
        at = self._graph.inserting_before(next(iter(self._graph.nodes)))
        with at if before is None else self._graph.inserting_after(before):
            gone = was.node
            return self._graph.create_node(gone.op, gone.target, name=was.name, type_expr=gone.type)


def _read(args: Any) -> list[fx.Node]:
    """The nodes in some arguments, in order."""
    found: list[fx.Node] = []
    fx.node.map_arg(args, found.append)
    return found


def note_failure(context: Context, names: Sequence[str], error: Exception) -> None:
    """Log that a part of a graph stays as it came, and add it to the failures of the context."""
    _log.warning(
        "runlora leaves %s as it came; please report this%s "
        "(options={'runlora.strict': True} raises instead): %s: %s",
        ", ".join(names),
        context.reproduced(error),
        type(error).__name__,
        error,
        exc_info=_log.isEnabledFor(logging.DEBUG),
    )
    context.failures.append(Failure(tuple(names), error))


@contextmanager
def transaction(graph: fx.Graph, as_it_is: Snapshot | None = None) -> Iterator[None]:
    """A context in which a graph is changed completely or not at all.

    Args:
        graph: The graph.
        as_it_is: A snapshot of the graph as it is now, if there is one already.

    Raises:
        Exception: Every exception from inside the block or from ``graph.lint()`` at its end. The
            graph is restored first.
    """
    snapshot = Snapshot(graph) if as_it_is is None else as_it_is
    try:
        yield
        if snapshot.has_changed():
            graph.lint()
    except BaseException:
        snapshot.restore()
        raise
