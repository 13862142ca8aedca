"""Effects: which nodes of a graph are random, modify memory, share memory, or run in another mode.

A rewrite moves computations, and merges equal calls. Both are right only if nothing in between
changes what the calls read:

    base = x @ w                     x.add_(1) modifies the memory that ``x @ w`` reads, so the
    x.add_(1)             ->         product stays in front of it: the graph is left as it came
    return base + x @ a @ b

:class:`Effects` is computed once for a graph, in time linear in its size, and never changes. Every
rewrite that moves, merges or recomputes a node asks it.

What shares memory and what is written to it is found in :mod:`memory`.

**Order.** Effects take place in graph order. A joint graph may write down what the forward does
behind the backward, as it does with the updates of buffers. There the order is that in which the
nodes run: all of the forward, then the backward.

**Versions.** The version of a tensor at a node is the number of writes to its memory in front of
that node. Two reads of a tensor see the same contents if they see the same version.

Invariant: if an answer is wrong, it is too cautious.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator

import torch
from torch import fx

from runlora_fx._torch_compat import must_run_backward
from runlora_fx.passes.read import calls
from runlora_fx.passes.read.gradients import gradient_nodes
from runlora_fx.passes.read.memory import NOTHING, Memories, Memory, Writes, storage
from runlora_fx.passes.read.switches import mode_of_nodes


class Effects:
    """The effects of one graph. Nodes that are added later are pure and modify nothing."""

    def __init__(self, graph: fx.Graph) -> None:
        """Find the effects of every node.

        Args:
            graph: The graph. Example tensors in ``meta["val"]`` help, but are not needed.
        """
        nodes = list(graph.nodes)
        self._position = {node: i for i, node in enumerate(nodes)}
        self._memories = Memories(graph.owning_module, self._position)
        self._mode = mode_of_nodes(nodes)
        self._writes = Writes()
        # All nodes but inputs and calls of pure operators. In most graphs they are few.
        self._unusual = [node for node in nodes if not _has_no_effect(node)]
        written = {node: memory for node in self._unusual if (memory := self._written_by(node))}
        if written:
            backward = _backward(graph)
            for i, node in enumerate(sorted(nodes, key=backward.__contains__)):
                self._position[node] = i
                self._memories.of(node)  # found now, because the graph will be changed
        for node in sorted(written, key=self._position.__getitem__):
            self._writes.add(node, self._position[node], written[node])

    # -- questions -----------------------------------------------------------------------------

    def is_pure(self, node: fx.Node) -> bool:
        """True if a node has no effect, and its value is determined by the values that it reads.

        Inputs and attributes are pure. A pure node may still read memory that another node
        modifies: see :meth:`version`.
        """
        if node.op in ("placeholder", "get_attr"):
            return True
        if node.op == "call_module":
            return self._memories.module(node).is_pure
        if node.op not in ("call_function", "call_method"):
            return False
        return calls.is_pure(node.target, node.args, node.kwargs)

    def is_random(self, node: fx.Node) -> bool:
        """True if a node may compute another value when it is called again on the same values."""
        if node.op == "call_module":
            return self._memories.module(node).is_random
        if node.op not in ("call_function", "call_method"):
            return False
        bodies = self._bodies(node)
        if bodies:
            return any(inner.is_random(n) for inner in bodies for n in inner.nodes)
        return calls.is_random(node.target, node.args, node.kwargs)

    def writes(self, node: fx.Node) -> frozenset[Memory]:
        """The memory that a node modifies."""
        return self._writes.by_node.get(node, NOTHING)

    def memory_of(self, node: fx.Node) -> frozenset[Memory]:
        """The memory that a node's result may lie in; of a node added later, its own."""
        return self._memories.of(node)

    def mode_of(self, node: fx.Node) -> int:
        """The mode that a node runs in: 0 for the one that the graph starts in."""
        return self._mode.get(node, 0)

    def version(self, node: fx.Node, at: fx.Node) -> int:
        """How often a tensor's memory was modified in front of another node."""
        if not self._writes.by_node:
            return 0
        return self._writes.version(self.memory_of(node), self._position[at])

    def is_overwritten(self, node: fx.Node) -> bool:
        """True if a node behind this one modifies the memory of its result."""
        if not self._writes.by_node:
            return False
        return self._writes.last(self.memory_of(node)) > self._position.get(node, -1)

    def attribute(self, node: fx.Node) -> Hashable:
        """A key that two ``get_attr`` nodes share exactly if they hold the same contents."""
        value = self._memories.attribute(str(node.target))
        same = id(value) if isinstance(value, torch.Tensor) else node.target
        return (same, self.version(node, node) if node in self._position else 0)

    def attribute_at(self, name: str, node: fx.Node) -> Hashable:
        """The same key for an attribute, at the place of a node that reads it."""
        value = self._memories.attribute(name)
        if not isinstance(value, torch.Tensor):
            return (name, 0)
        return (id(value), self._writes.version(frozenset([storage(value)]), self._position[node]))

    @property
    def writes_inputs(self) -> bool:
        """True if the graph modifies an input or an attribute."""
        ops = ("placeholder", "get_attr")
        given = (self.memory_of(node) for node in self._position if node.op in ops)
        return any(map(self._writes.any_to, given))

    @property
    def writing(self) -> Iterable[fx.Node]:
        """The nodes that modify memory."""
        return self._writes.by_node.keys()

    @property
    def nodes(self) -> Iterable[fx.Node]:
        """The nodes of the graph as it was."""
        return self._position.keys()

    # -- nodes that must not move --------------------------------------------------------------

    def fixed(self, is_readable: Callable[[fx.Node], bool]) -> frozenset[fx.Node]:
        """The nodes that must be computed where they stand, and equal no other node.

        All other nodes may be read through: what they compute may be computed again in front of
        any node that is reached from them through readable nodes alone, and tensors that are equal
        by value numbers may stand for each other there. A node is fixed if it

        * runs in another mode than the graph starts in, or modifies memory, or is not pure though
          it is readable;
        * makes new memory that is modified later: each such result needs its own;
        * returns a view that some node reads in another version than it was made in;
        * reads a tensor in another version than most of the nodes that read this tensor do;
        * is readable, and what it reads is modified before the last node that it may move to.

        Args:
            is_readable: True if a node is one that a rewrite may read through.
        """
        if not self._writes.by_node:
            alone = (*self._unusual, *self._mode)
            return frozenset([node for node in alone if self._is_fixed_alone(node, is_readable)])
        fixed = {node for node in self._position if self._is_fixed_alone(node, is_readable)}
        for node in self._position:
            fixed.update(self._strangers(node))
        reach: dict[fx.Node, int] = {}
        for node in reversed(self._position):
            here = self._position[node]
            reach[node] = max(
                [here, *(reach[user] for user in node.users if user in reach)], default=here
            )
            if node in fixed or not is_readable(node) or self._changes(node, reach[node]):
                if is_readable(node):
                    fixed.add(node)
                del reach[node]
        return frozenset(fixed)

    def _is_fixed_alone(self, node: fx.Node, is_readable: Callable[[fx.Node], bool]) -> bool:
        if self.mode_of(node) or self.writes(node):
            return True
        if not self.is_pure(node) and is_readable(node):
            return True
        if node.op in ("placeholder", "output") or not self._writes.by_node:
            return False
        memory = self.memory_of(node)
        if node in memory:
            return self.is_overwritten(node)
        made = self._writes.version(memory, self._position[node])
        return any(self.version(node, user) != made for user in node.users)

    def _strangers(self, node: fx.Node) -> Iterator[fx.Node]:
        """The users of a node that read it in another version than most do."""
        if not self.is_overwritten(node):
            return
        versions = {user: self.version(node, user) for user in node.users if user.op != "output"}
        readers = Counter(v for user, v in versions.items() if user not in self._writes.by_node)
        if readers:
            usual, _ = readers.most_common(1)[0]
            yield from (user for user, version in versions.items() if version != usual)

    def _changes(self, node: fx.Node, until: int) -> bool:
        """True if what a node reads is modified behind it, in front of a position."""
        here = self._position[node]
        read = self._read(node)
        return any(self._writes.version(m, here) != self._writes.version(m, until) for m in read)

    def _read(self, node: fx.Node) -> Iterator[frozenset[Memory]]:
        """The memory that a node reads: of its arguments, and of the state of what it calls."""
        yield from map(self.memory_of, node.all_input_nodes)
        if node.op == "call_module":
            yield self._memories.module(node).state

    # -- one node ------------------------------------------------------------------------------

    def _written_by(self, node: fx.Node) -> frozenset[Memory]:
        if node.op == "call_module":
            module = self._memories.module(node)
            if not module.writes_arguments:
                return module.written
            return module.written | self._memories.among((*node.args, *node.kwargs.values()))
        if node.op not in ("call_function", "call_method"):
            return NOTHING
        known = calls.operator_facts(node.target)
        if known is not None and known.never_writes:
            return NOTHING
        if calls.is_functional(node.target):
            return NOTHING
        bodies = self._bodies(node)
        if bodies and not any(inner.writes_inputs for inner in bodies):
            return NOTHING
        written = calls.written_arguments(node.target, node.args, node.kwargs)
        return self._memories.among(list(written))

    def _bodies(self, node: fx.Node) -> list[Effects]:
        """The effects of the graphs that a higher-order operator calls."""
        if not calls.is_foreign(node.target):
            return []
        found = (
            self._memories.attribute(str(n.target))
            for n in node.all_input_nodes
            if n.op == "get_attr"
        )
        return [Effects(module.graph) for module in found if isinstance(module, fx.GraphModule)]


def _backward(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a joint graph that can only run in the backward."""
    backward = gradient_nodes(graph)
    for node in graph.nodes if backward else ():
        if must_run_backward(node) or not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
    return backward


def _has_no_effect(node: fx.Node) -> bool:
    """True if a node is an input, or a call that is pure whatever its arguments are."""
    if node.op == "call_function":
        known = calls.operator_facts(node.target)
        return known is not None and bool(known.is_pure)
    return node.op in ("placeholder", "get_attr")
