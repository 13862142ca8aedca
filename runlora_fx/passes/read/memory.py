"""Memory: which results may share memory, and how often a graph writes to it.

    y = x.view(-1)          y lies in the memory of x
    x.add_(1)               version 1 of that memory, for y too
    z = y * 2               z has memory of its own, and reads y in version 1

A placeholder, a parameter and every result that is not a view have memory of their own; a view has
that of its base. A function that is not known may return a view of any argument. Attributes are
told apart by their storage: a parameter under two names, and a buffer that is a view of another,
are one memory. So are placeholders whose example tensors share a storage. *Assumed:* other
placeholders overlap neither one another nor an attribute, as Dynamo and AOTAutograd guarantee.

Invariant: two results that share memory have a name of memory in common; the reverse need not hold.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Hashable
from typing import Any, TypeAlias

import torch
from torch import fx

from runlora_fx._torch_compat import storage_of
from runlora_fx.passes.read import calls
from runlora_fx.passes.read.module_effects import ModuleEffects, module_effects

#: What names a piece of memory: the node that made it, or the storage of an attribute or input.
Memory: TypeAlias = Hashable

NOTHING: frozenset[Memory] = frozenset()


class Memories:
    """The memory of the nodes of one graph, found when it is first asked for."""

    def __init__(self, owner: torch.nn.Module | None, nodes: Container[fx.Node]) -> None:
        """Prepare to find it.

        Args:
            owner: The module that the graph belongs to.
            nodes: The nodes of the graph.
        """
        self._owner = owner
        self._nodes = nodes
        self._modules: dict[fx.Node, ModuleEffects] = {}
        self._found: dict[fx.Node, frozenset[Memory]] = {}

    def of(self, node: fx.Node) -> frozenset[Memory]:
        """The memory that a node's result may lie in; of a node added later, its own."""
        found = self._found.get(node)
        if found is not None:
            return found
        if node not in self._nodes:
            return frozenset([node])
        pending = [node]  # no recursion: a chain of views may be long
        while pending:
            below = self._viewed(pending[-1])
            unknown = [n for n in below if n in self._nodes and n not in self._found]
            if unknown:
                pending += unknown
                continue
            last = pending.pop()
            self._found[last] = self._memory_of(last, below)
        return self._found[node]

    def among(self, arguments: Any) -> frozenset[Memory]:
        """The memory of all tensors in some arguments."""
        return _union([self.of(node) for node in _tensors(arguments)])

    def attribute(self, target: str) -> object:
        """What an attribute holds; None if the graph belongs to no module."""
        found: object = self._owner
        for name in target.split("."):
            found = getattr(found, name, None)
        return found

    def module(self, node: fx.Node) -> ModuleEffects:
        """The effects of the module that a node calls."""
        if node not in self._modules:
            assert self._owner is not None, "a graph that calls modules belongs to one"
            module = self._owner.get_submodule(str(node.target))
            self._modules[node] = module_effects(module, storage)
        return self._modules[node]

    def _viewed(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that a call may return a view of."""
        if node.op in ("call_function", "call_method"):
            known = calls.operator_facts(node.target)
            if known is not None and known.never_views:
                return []
            return _tensors(list(calls.viewed_arguments(node.target, node.args, node.kwargs)))
        if node.op == "call_module" and not self.module(node).is_fresh:
            return _tensors((*node.args, *node.kwargs.values()))
        return []

    def _memory_of(self, node: fx.Node, viewed: list[fx.Node]) -> frozenset[Memory]:
        if node.op == "output":
            return NOTHING
        if node.op in ("placeholder", "get_attr"):
            is_input = node.op == "placeholder"
            value = node.meta.get("val") if is_input else self.attribute(str(node.target))
            return frozenset([storage(value) if isinstance(value, torch.Tensor) else node])
        state = NOTHING
        if node.op == "call_module" and not self.module(node).is_fresh:
            state = self.module(node).state
        return _union([*map(self.of, viewed), state]) or frozenset([node])


class Writes:
    """When a graph writes to which memory."""

    def __init__(self) -> None:
        """Start without any."""
        self.by_node: dict[fx.Node, frozenset[Memory]] = {}
        self._at: dict[Memory, list[int]] = {}

    def add(self, node: fx.Node, position: int, written: frozenset[Memory]) -> None:
        """Note what a node writes. Nodes are added in graph order."""
        self.by_node[node] = written
        for memory in written:
            self._at.setdefault(memory, []).append(position)

    def any_to(self, memory: frozenset[Memory]) -> bool:
        """True if some node writes to some of the memory."""
        return not self._at.keys().isdisjoint(memory)

    def version(self, memory: frozenset[Memory], position: int) -> int:
        """How often some memory was written to in front of a position.

        The sum of counts that only grow: equal sums mean that no count grew.
        """
        if not self._at:
            return 0
        counted = (self._at[m] for m in memory if m in self._at)
        return sum(bisect_left(positions, position) for positions in counted)

    def last(self, memory: frozenset[Memory]) -> int:
        """The position of the last write to some memory; -1 if there is none."""
        return max((self._at[m][-1] for m in memory if m in self._at), default=-1)


def storage(tensor: torch.Tensor) -> Memory:
    """The name of the memory that a tensor lies in."""
    return ("storage", storage_of(tensor))


def _tensors(arguments: Any) -> list[fx.Node]:
    """The nodes in some arguments that may hold tensors."""
    found: list[fx.Node] = []

    def see(node: fx.Node) -> fx.Node:
        value = node.meta.get("val")
        if value is None or not isinstance(value, int | float | bool | torch.SymInt):
            found.append(node)
        return node

    fx.node.map_arg(arguments, see)
    return found


def _union(memories: list[frozenset[Memory]]) -> frozenset[Memory]:
    distinct = set(memories)
    return distinct.pop() if len(distinct) == 1 else NOTHING.union(*distinct)
