"""Value numbers: nodes that must hold the same tensor get the same number.

Example: under autocast every use of an activation has its own cast, and PEFT folds it once per
adapter. All of these nodes have one number, and are one leaf.

Invariant: two nodes of one number hold equal tensors, to the last bit.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import fx

from runlora_fx.passes.levels.origins import Computed
from runlora_fx.passes.read import calls
from runlora_fx.passes.read.effects import Effects

#: Calls that give the same tensor, to the last bit, for two arguments in either order.
_COMMUTATIVE = (
    *(torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor),
    *(torch.add, torch.mul, operator.add, operator.mul),
)
_IS_COMMUTATIVE = frozenset(map(id, _COMMUTATIVE))


class _NoHashError(Exception):
    """A constant cannot be a part of a key."""


class ValueNumbers:
    """The number of every node of a graph; nodes added later are numbered when asked for."""

    def __init__(self, graph: fx.Graph, effects: Effects, fixed: Collection[fx.Node] = ()) -> None:
        """Number the nodes of a graph.

        Args:
            graph: The graph.
            effects: What its nodes do besides computing a value.
            fixed: Nodes that equal no other node, whatever they call (:meth:`Effects.fixed`).
        """
        self._effects = effects
        self._fresh = count()
        self._by_key: dict[Hashable, int] = {}
        self._number: dict[fx.Node, int] = {}
        self._nodes: dict[int, list[fx.Node]] = {}
        for node in fixed:
            self.add(node, None)
        for node in graph.nodes:
            self.of(node)

    def of(self, node: fx.Node) -> int:
        """The value number of a node whose arguments are numbered already."""
        number = self._number.get(node)
        if number is not None:
            return number
        if node.op == "get_attr":
            key: Hashable | None = ("get_attr", self._effects.attribute(node))
        else:
            key = self.key(node.op, node.target, node.args, node.kwargs)
        return self.add(node, key)

    def add(self, node: fx.Node, key: Hashable | None) -> int:
        """Number a node that makes the call of a key."""
        number = next(self._fresh) if key is None else self._by_key.get(key)
        if number is None:
            number = self._by_key[key] = next(self._fresh)
        self._number[node] = number
        self._nodes.setdefault(number, []).append(node)
        return number

    def first(self, number: int) -> fx.Node:
        """The earliest node that holds a value."""
        return self._nodes[number][0]

    def equals(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that hold the same value as this one, itself included."""
        return self._nodes[self.of(node)]

    def known(self, key: Hashable | None) -> Sequence[fx.Node]:
        """The nodes that make the call of a key, or hold the same value."""
        number = None if key is None else self._by_key.get(key)
        return () if number is None else self._nodes.get(number, ())

    def of_call(self, target: Any, args: tuple[Any, ...]) -> int:
        """The number of what a call computes, whether or not a node makes it.

        Args:
            target: What is called.
            args: Nodes, constants, and origins that are computed.
        """
        key = self.key("call_function", target, args, {})
        number = None if key is None else self._by_key.get(key)
        if number is None:
            number = self._by_key[key] = next(self._fresh)
        return number

    def of_attribute(self, name: str, at: fx.Node) -> int:
        """The number of what an attribute of the graph's module holds where a node reads it."""
        key = ("get_attr", self._effects.attribute_at(name, at))
        if key not in self._by_key:
            self._by_key[key] = next(self._fresh)
        return self._by_key[key]

    def key(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Hashable | None:
        """The key of a call; None if two equal calls may return different tensors."""
        facts = calls.operator_facts(target)
        if facts is None or facts.is_pure is None:
            is_call = op in ("call_function", "call_method")
            is_pure = is_call and calls.is_pure(target, args, kwargs)
        else:
            is_pure = facts.is_pure
        if not is_pure:
            return None
        known = self._number
        try:
            frozen: list[Any] = [
                (known[x],) if isinstance(x, fx.Node) and x in known else self._freeze(x)
                for x in args
            ]
            named = tuple(sorted((k, self._freeze(v)) for k, v in kwargs.items())) if kwargs else ()
        except _NoHashError:
            return None
        if len(frozen) == 2 and id(target) in _IS_COMMUTATIVE:
            first, other = frozen
            if type(first) is tuple is type(other) and len(first) == len(other) == 1:
                frozen.sort()  # the numbers of two values
            else:
                frozen.sort(key=repr)
        # Operators are compared by identity: their own hash is a slow call of a Python method.
        called = target if facts is None else id(target)
        return (op, called, *frozen, named)

    def _freeze(self, x: Any) -> Hashable:
        """An argument as a part of a key. A node becomes a tuple of its value number.

        Raises:
            _NoHashError: If a constant in it has no hash.
        """
        if isinstance(x, fx.Node):
            return (self.of(x),)
        if type(x) is int:
            return x
        if isinstance(x, Computed):
            return (self.of_call(x.target, x.args),)
        if isinstance(x, list | tuple):
            return (list, *[y if type(y) is int else self._freeze(y) for y in x])
        if isinstance(x, dict):
            return (dict, *sorted((k, self._freeze(v)) for k, v in x.items()))
        try:
            hash(x)
        except TypeError:
            raise _NoHashError from None
        return (type(x), x)
