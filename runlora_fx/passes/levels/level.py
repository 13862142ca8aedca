"""Level: the table of readers of one kind of graph, and the calls that emission writes.

Example: ``ATEN.read(node)`` of ``aten.mm(x, w)`` is the matrix product of ``x`` and ``w``.

Invariant: a node without a form is a leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx

from runlora_fx.passes.levels.forms import Form

#: Namespaces whose operators are in ``readers``, because they are always registered.
_OWN = ("aten", "prims")

#: The largest number of nodes in a row that :meth:`Dialect.is_made_of_product` looks through.
_DEPTH = 6

#: Reads a node's normalised arguments.
Reader: TypeAlias = Callable[..., Form | None]


@dataclass(frozen=True)
class Calls:
    """The call targets that emission writes.

    Attributes:
        stacked: Multiplies a tensor of any rank by a matrix; None if the level has no such call.
            With it activations are not flattened, so the graph stays valid for any batch shape.
        merged_weight: Adds a product to a weight and keeps the result between calls; None if the
            graph is still to be differentiated.
    """

    mm: Callable[..., Any]
    bmm: Callable[..., Any]
    addmm: Callable[..., Any]
    add: Callable[..., Any]
    mul: Callable[..., Any]
    div: Callable[..., Any]
    permute: Callable[..., Any]
    view: Callable[..., Any]
    reshape: Callable[..., Any]
    size: Callable[..., Any]
    cast: Callable[..., Any]
    clone: Callable[..., Any]
    full: Callable[..., Any]
    expand: Callable[..., Any]
    sum: Callable[..., Any]
    stacked: Callable[..., Any] | None = None
    merged_weight: Callable[..., Any] | None = None


def asks_about(node: fx.Node) -> bool:
    """True if a node reads the dtype or the device of a tensor, and no element."""
    is_attribute = node.op == "call_function" and node.target is getattr
    return is_attribute and node.args[1] in ("dtype", "device")


@dataclass(frozen=True)
class Dialect:
    """One graph level.

    Attributes:
        name: Its name in errors.
        graph: The name in reports of a graph of this level without a backward.
        readers: By call target or method name, the reader. It takes the arguments of a node and
            returns its form, or None if the node is not linear.
        calls: The targets that emission writes.
        foreign: By name, the readers of operators that exist only if another library is imported.
        modules: The reader of nodes that call modules; None if the level has no such nodes.
        unread: Nodes that must not be read, whatever they call.
    """

    name: str
    graph: str
    readers: Mapping[Any, Reader]
    calls: Calls
    foreign: Mapping[str, Reader] = field(default_factory=dict)
    modules: Callable[[fx.Node], Form | None] | None = None
    unread: frozenset[fx.Node] = frozenset()
    # The readers of operators, by identity: the hash of an operator is a slow call in Python.
    _of_operators: dict[int, tuple[object, Reader | None]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def read(self, node: fx.Node) -> Form | None:
        """The form of a node, or None if it is not readable linear algebra."""
        if node in self.unread:
            return None
        if node.op == "call_module":
            return None if self.modules is None else self.modules(node)
        if node.op not in ("call_function", "call_method"):
            return None
        reader = self._reader(node.target)
        if reader is None:
            return None
        try:
            form = reader(*node.args, **node.kwargs)
        except TypeError:
            # The reader does not take the arguments of this overload (out=, dtype=, ...).
            return None
        if form is None or (self.unread and not self.unread.isdisjoint(form.absorbed)):
            return None
        return form

    def _reader(self, target: Any) -> Reader | None:
        """The reader of a target; None if it has none."""
        operator, reader = self._of_operators.get(id(target), (None, None))
        if operator is target:
            return reader
        reader = self.readers.get(target)
        if isinstance(target, torch._ops.OpOverload):
            if reader is None and target.namespace not in _OWN:
                reader = self.foreign.get(str(target))
            self._of_operators[id(target)] = (target, reader)
        return reader

    def is_absorbed(self, node: fx.Node) -> bool:
        """True if every user absorbs a node: reads it as a part of itself."""
        forms = map(self.read, node.users)
        return bool(node.users) and all(f is not None and node in f.absorbed for f in forms)

    def is_readable(self, node: fx.Node) -> bool:
        """True if a node has a form, or is absorbed."""
        return self.read(node) is not None or self.is_absorbed(node)

    def users_of(self, node: fx.Node) -> list[fx.Node]:
        """The users that read a node's elements; an absorbed user is replaced by its own users."""
        users = [user for user in node.users if not asks_about(user)]
        readers = (list(u.users) if self.is_absorbed(u) else [u] for u in users)
        return list(dict.fromkeys(reader for group in readers for reader in group))

    def is_made_of_product(self, node: fx.Node, depth: int = _DEPTH) -> bool:
        """True if a product of matrices is added up, scaled, viewed or cast to a node."""
        form = self.read(node)
        if form is None or depth == 0:
            return False
        return bool(form.products) or any(
            self.is_made_of_product(source, depth - 1) for source in form.sources
        )
