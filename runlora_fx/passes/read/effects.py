"""Effects: what of a graph is random, what modifies memory, what shares it, and in which mode.

A rewrite moves a computation to the node whose result it replaces, and takes equal calls for one.
Both are only right if nothing happens in between:

    base = x @ w                     x.add_(1) modifies the memory that ``x @ w`` reads, so the
    x.add_(1)             ->         product stays in front of it: the graph is left as it came
    return base + x @ a @ b

:class:`Effects` is computed once for a graph, in time linear in its size, and never changes. Every
rewrite that moves, merges or recomputes a node asks it.

**Memory.** A placeholder, a parameter and every result that is not a view have memory of their own;
a view has that of its base. A function that is not known may return a view of any argument.
Attributes are told apart by their storage: a parameter under two names, and a buffer that is a view
of another, are one memory. So are placeholders whose example tensors share a storage. *Assumed:*
other placeholders overlap neither one another nor an attribute, as Dynamo and AOTAutograd
guarantee.

**Versions.** The version of a tensor at a node is the number of writes to its memory in front of
that node. Two reads of a tensor see the same contents if they see the same version.

Invariant: an answer may be too cautious, never too bold.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import fx

from runlora_fx._torch_compat import storage_of
from runlora_fx.passes.read import calls
from runlora_fx.passes.read.module_effects import ModuleEffects, module_effects
from runlora_fx.passes.read.switches import mode_of_nodes

#: What names a piece of memory: the node that made it, or the storage of an attribute or input.
Memory: TypeAlias = Hashable

_NOTHING: frozenset[Memory] = frozenset()


class Effects:
    """The effects of one graph. Nodes that are added later are pure and modify nothing."""

    def __init__(self, graph: fx.Graph) -> None:
        """Find the effects of every node.

        Args:
            graph: The graph. Example tensors in ``meta["val"]`` help, but are not needed.
        """
        nodes = list(graph.nodes)
        self._position = {node: i for i, node in enumerate(nodes)}
        self._owner = graph.owning_module
        self._mode = mode_of_nodes(graph)
        self._pure: dict[fx.Node, bool] = {}
        self._modules: dict[fx.Node, ModuleEffects] = {}
        self._memory: dict[fx.Node, frozenset[Memory]] = {}
        self._writes: dict[fx.Node, frozenset[Memory]] = {}
        self._written_at: dict[Memory, list[int]] = {}
        for node in nodes:
            self._memory[node] = self._memory_of(node)
            written = self._written_by(node)
            if written:
                self._writes[node] = written
                for memory in written:
                    self._written_at.setdefault(memory, []).append(self._position[node])

    # -- questions -----------------------------------------------------------------------------

    def is_pure(self, node: fx.Node) -> bool:
        """Whether a node's value is determined by the values that it reads, and nothing else is.

        Inputs and attributes are. A pure node may still read memory that another node modifies:
        see :meth:`is_movable`.
        """
        if node not in self._pure:
            self._pure[node] = self._is_pure(node)
        return self._pure[node]

    def is_random(self, node: fx.Node) -> bool:
        """Whether a node may compute another value when it is called again on the same values."""
        if node.op == "call_module":
            return self._module(node).is_random
        if node.op not in ("call_function", "call_method"):
            return False
        bodies = self._bodies(node)
        if bodies:
            return any(inner.is_random(n) for inner in bodies for n in inner.nodes)
        return calls.is_random(node.target, node.args, node.kwargs)

    def writes(self, node: fx.Node) -> frozenset[Memory]:
        """The memory that a node modifies."""
        return self._writes.get(node, _NOTHING)

    def memory_of(self, node: fx.Node) -> frozenset[Memory]:
        """The memory that a node's result may lie in; of a node added later, its own."""
        known = self._memory.get(node)
        return frozenset([node]) if known is None else known

    def mode_of(self, node: fx.Node) -> int:
        """The mode that a node runs in: 0 for the one that the graph starts in."""
        return self._mode.get(node, 0)

    def version(self, node: fx.Node, at: fx.Node) -> int:
        """How often a tensor's memory was modified in front of another node."""
        return self._version(self.memory_of(node), self._position[at])

    def is_movable(self, node: fx.Node, to: fx.Node) -> bool:
        """Whether a node computes the same value in front of another node.

        Args:
            node: A node of the graph.
            to: Another, earlier or later.

        Returns:
            True if the node is pure, both run in the same mode, and no node between them modifies
            what the node reads or returns.
        """
        if not self.is_pure(node) or self.mode_of(node) != self.mode_of(to):
            return False
        here, there = self._position[node], self._position[to]
        seen = (self.memory_of(node), *self._read(node))
        return all(self._version(m, here) == self._version(m, there) for m in seen)

    def is_overwritten(self, node: fx.Node) -> bool:
        """Whether a node behind this one modifies the memory of its result."""
        return self._last_write(self.memory_of(node)) > self._position.get(node, -1)

    def attribute(self, node: fx.Node) -> Hashable:
        """What two ``get_attr`` nodes have in common exactly if they hold the same contents."""
        value = self._attribute(str(node.target))
        same = id(value) if isinstance(value, torch.Tensor) else node.target
        return (same, self.version(node, node) if node in self._position else 0)

    def attribute_at(self, name: str, node: fx.Node) -> Hashable:
        """The same for an attribute that another node of the graph reads."""
        value = self._attribute(name)
        if not isinstance(value, torch.Tensor):
            return (name, 0)
        return (id(value), self._version(frozenset([_storage(value)]), self._position[node]))

    @property
    def writes_inputs(self) -> bool:
        """Whether the graph modifies an input or an attribute."""
        ops = ("placeholder", "get_attr")
        given = (self._memory[node] for node in self._position if node.op in ops)
        return any(memory in self._written_at for group in given for memory in group)

    @property
    def nodes(self) -> Iterable[fx.Node]:
        """The nodes of the graph as it was."""
        return self._position.keys()

    # -- what must stay ------------------------------------------------------------------------

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
            is_readable: Whether a node is one that a rewrite may read through.
        """
        fixed = {node for node in self._position if self._is_fixed_alone(node, is_readable)}
        if not self._written_at:
            return frozenset(fixed)
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
        if node.op in ("placeholder", "output") or not self._written_at:
            return False
        memory = self.memory_of(node)
        if node in memory:
            return self.is_overwritten(node)
        made = self._version(memory, self._position[node])
        return any(self.version(node, user) != made for user in node.users)

    def _strangers(self, node: fx.Node) -> Iterator[fx.Node]:
        """The users of a node that read it in another version than most do."""
        if not self.is_overwritten(node):
            return
        versions = {user: self.version(node, user) for user in node.users if user.op != "output"}
        readers = Counter(v for user, v in versions.items() if user not in self._writes)
        if readers:
            usual, _ = readers.most_common(1)[0]
            yield from (user for user, version in versions.items() if version != usual)

    def _changes(self, node: fx.Node, until: int) -> bool:
        """Whether what a node reads is modified behind it, in front of a position."""
        here = self._position[node]
        read = self._read(node)
        return any(self._version(m, here) != self._version(m, until) for m in read)

    def _read(self, node: fx.Node) -> Iterator[frozenset[Memory]]:
        """The memory that a node reads: of its arguments, and of the state of what it calls."""
        yield from map(self.memory_of, node.all_input_nodes)
        if node.op == "call_module":
            yield self._module(node).state

    # -- versions ------------------------------------------------------------------------------

    def _version(self, memory: frozenset[Memory], position: int) -> int:
        # The sum of counts that only grow: equal sums mean that no count grew.
        counted = (self._written_at[m] for m in memory if m in self._written_at)
        return sum(bisect_left(positions, position) for positions in counted)

    def _last_write(self, memory: frozenset[Memory]) -> int:
        return max((self._written_at[m][-1] for m in memory if m in self._written_at), default=-1)

    # -- one node ------------------------------------------------------------------------------

    def _is_pure(self, node: fx.Node) -> bool:
        if node.op in ("placeholder", "get_attr"):
            return True
        if node.op == "call_module":
            return self._module(node).is_pure
        if node.op not in ("call_function", "call_method"):
            return False
        return calls.is_pure(node.target, node.args, node.kwargs)

    def _memory_of(self, node: fx.Node) -> frozenset[Memory]:
        match node.op:
            case "placeholder":
                value = node.meta.get("val")
                return frozenset([_storage(value) if isinstance(value, torch.Tensor) else node])
            case "get_attr":
                value = self._attribute(str(node.target))
                return frozenset([_storage(value) if isinstance(value, torch.Tensor) else node])
            case "output":
                return _NOTHING
            case "call_module":
                module = self._module(node)
                if module.is_fresh:
                    return frozenset([node])
                viewed: Any = (*node.args, *node.kwargs.values())
                below = self._memory_in(viewed) | module.state
            case _:
                if isinstance(node.target, torch._ops.OpOverload) and calls.never_views(
                    node.target
                ):
                    return frozenset([node])
                viewed = list(calls.viewed_arguments(node.target, node.args, node.kwargs))
                below = self._memory_in(viewed)
        return below or frozenset([node])

    def _written_by(self, node: fx.Node) -> frozenset[Memory]:
        if node.op == "call_module":
            module = self._module(node)
            if not module.writes_arguments:
                return module.written
            return module.written | self._memory_in((*node.args, *node.kwargs.values()))
        if node.op not in ("call_function", "call_method"):
            return _NOTHING
        if isinstance(node.target, torch._ops.OpOverload) and calls.never_writes(node.target):
            return _NOTHING
        if calls.is_functional(node.target):
            return _NOTHING
        bodies = self._bodies(node)
        if bodies and not any(inner.writes_inputs for inner in bodies):
            return _NOTHING
        written = calls.written_arguments(node.target, node.args, node.kwargs)
        return self._memory_in(list(written))

    def _memory_in(self, arguments: Any) -> frozenset[Memory]:
        """The memory of all tensors in some arguments."""
        found: list[frozenset[Memory]] = []

        def see(node: fx.Node) -> fx.Node:
            value = node.meta.get("val")
            if value is None or not isinstance(value, int | float | bool | torch.SymInt):
                found.append(self.memory_of(node))
            return node

        fx.node.map_arg(arguments, see)
        distinct = set(found)
        return distinct.pop() if len(distinct) == 1 else _NOTHING.union(*distinct)

    def _module(self, node: fx.Node) -> ModuleEffects:
        if node not in self._modules:
            assert self._owner is not None, "a graph that calls modules belongs to one"
            module = self._owner.get_submodule(str(node.target))
            self._modules[node] = module_effects(module, _storage)
        return self._modules[node]

    def _attribute(self, target: str) -> object:
        """What an attribute holds; None if the graph belongs to no module."""
        found: object = self._owner
        for name in target.split("."):
            found = getattr(found, name, None)
        return found

    def _bodies(self, node: fx.Node) -> list[Effects]:
        """The effects of the graphs that a higher-order operator calls."""
        if not calls.is_foreign(node.target) or self._owner is None:
            return []
        found = (self._attribute(str(n.target)) for n in node.all_input_nodes if n.op == "get_attr")
        return [Effects(module.graph) for module in found if isinstance(module, fx.GraphModule)]


def _storage(tensor: torch.Tensor) -> Memory:
    return ("storage", storage_of(tensor))
