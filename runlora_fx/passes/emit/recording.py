"""Recordings: what is written for a root, in terms that hold for every equal root.

    layer 0 writes                        a template says
        p = permute(W0)                       call 0: permute(leaf 1 of the region)
        mm(X0, p)                             call 1: mm(leaf 0 of the region, call 0)

A root is made of parts, and each part stands in a region or is a leaf. Whatever has leaf numbers of
its own is a *slot* here. A node that the calls read has *roles*: leaf 1 of slot 0, the second value
made of slot 0, the fourth incoming step of slot 0. Roles are what equal roots have in common.

Invariant: whoever makes the calls of a template on nodes of the same roles, layouts and answers
(:class:`Template`) writes what would be written step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import fx

from runlora_fx._torch_compat import is_plain_fake, storage_of
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.emit.example_results import Layout, layout_of
from runlora_fx.passes.emit.rules import Name, Rule
from runlora_fx.passes.levels.forms import Form


class Slot(NamedTuple):
    """What has leaf numbers of its own: a region, or a part of a root that is in none.

    Attributes:
        region: The region; None for a part of its own.
        matrices: By number of its own, the leaf number of the graph.
        scalars: The same for scalar leaves.
    """

    region: int | None
    matrices: tuple[int, ...]
    scalars: tuple[int, ...]


class Role(NamedTuple):
    """What a node is to a root.

    Attributes:
        kind: ``"leaf"`` and ``"scalar"`` hold a leaf. ``"forward"`` and ``"backward"`` show one as
            a matrix in a phase. ``"made"`` was made for a root before. ``"came"`` came with the
            graph.
        slot: The slot.
        number: Which of the slot's.
    """

    kind: Literal["leaf", "scalar", "forward", "backward", "made", "came"]
    slot: int
    number: int


class Call(NamedTuple):
    """One call.

    Attributes:
        target: What is called.
        args: Its arguments; None in the place of each node.
        nodes: The places of nodes among them, each with the register of the node.
        kwargs: Keyword arguments.
        found: None if the call is written; else whether the node that makes it already is ours.
        is_open: Whether some node might make the call already.
        layout: The layout of the result.
        value: An example result.
        view_of: The register of the node whose memory the result is; None if it has its own.
        rule: Which of the template's rules it is written for.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    nodes: tuple[tuple[int, int], ...]
    kwargs: dict[str, Any]
    found: bool | None
    is_open: bool
    layout: Layout
    value: Any
    view_of: int | None
    rule: int

    def arguments(self, registers: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with nodes in their places."""
        args = list(self.args)
        for place, register in self.nodes:
            args[place] = registers[register]
        return tuple(args)


class Came(NamedTuple):
    """What was asked about a product of the graph as it came.

    Attributes:
        role: The product.
        is_before: Whether it stands in front of the root.
        facts: All else that it is taken or left for.
    """

    role: Role
    is_before: bool
    facts: object


class Made(NamedTuple):
    """A value that was made for a root: the first register holds it, or its transpose."""

    slot: int
    value: Value
    register: int
    transposed: bool


@dataclass(frozen=True)
class Template:
    """What was written for a root.

    Registers number nodes: 0, 1, 2 for those of the calls, -1, -2, -3 for those that they read.

    Attributes:
        number: Tells templates apart.
        slots: The slots of the root that it was written for.
        inputs: The roles of each node that is read.
        asked: By leaf as a matrix in a phase, whether it was made before.
        came: What was asked about products that came.
        calls: What is called.
        rules: What calls are written for; names stand for numbers of slots.
        result: The register of the root.
        made: The values made, in order.
        shown: The leaves that were made matrices, in order.
        recomputed: The registers that the backward computes again.
        copied: By the register of a copy with the strides of the root, that of the root as it was.
        nodes: What the registers were.
    """

    number: int
    slots: tuple[Slot, ...]
    inputs: tuple[tuple[Role, ...], ...]
    asked: tuple[tuple[Role, bool], ...]
    came: tuple[Came, ...]
    calls: tuple[Call, ...]
    rules: tuple[Rule, ...]
    result: int
    made: tuple[Made, ...]
    shown: tuple[tuple[Role, int], ...]
    recomputed: tuple[int, ...]
    copied: tuple[tuple[int, int], ...]
    nodes: tuple[fx.Node, ...]

    def form(self, call: int, registers: Sequence[fx.Node], forms: Mapping[fx.Node, Form]) -> Any:
        """What a call computes on other nodes; None if nobody reads it.

        Args:
            call: Which call.
            registers: The other nodes.
            forms: The forms of the template's own nodes.
        """
        form = forms.get(self.nodes[call])
        return _on_nodes(form, dict(zip(self.nodes, registers, strict=True)))


def _on_nodes(x: Any, nodes: Mapping[fx.Node, fx.Node]) -> Any:
    """A form, or a part of one, of other nodes."""
    if isinstance(x, fx.Node):
        return nodes.get(x, x)
    if isinstance(x, tuple):
        parts = [_on_nodes(y, nodes) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if is_dataclass(x) and not isinstance(x, type):
        changed = {field.name: _on_nodes(getattr(x, field.name), nodes) for field in fields(x)}
        return replace(x, **changed)
    return x


class _NotRecordedError(Exception):
    """Something was written that an equal root may not have."""


class Recording:
    """Takes down what is written for one root, while it is written."""

    def __init__(
        self,
        slots: tuple[Slot, ...],
        roles: Mapping[fx.Node, list[Role]],
        mode: Any,
    ) -> None:
        """Begin.

        Args:
            slots: The slots of the root.
            roles: What each node is to the root so far.
            mode: The fake mode that example values live in.
        """
        self._slots = slots
        self._roles = {node: list(known) for node, known in roles.items()}
        self._mode = mode
        self._registers: dict[fx.Node, int] = {}
        self._inputs: list[fx.Node] = []
        self._calls: list[Call] = []
        self._nodes: list[fx.Node] = []
        self._rules: dict[Rule, int] = {}
        self._asked: dict[Role, bool] = {}
        self._came: dict[Role, Came] = {}
        self._made: list[tuple[int, Value, fx.Node, bool]] = []
        self._shown: list[tuple[Role, fx.Node]] = []
        self._is_spoiled = False

    def spoil(self) -> None:
        """Give up: what is written depends on more than is taken down."""
        self._is_spoiled = True

    # -- events --------------------------------------------------------------------------------

    def called(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        node: fx.Node,
        rule: Rule,
        found: bool | None,
    ) -> None:
        """A call was written, or a node was found that makes it.

        Args:
            target: What is called.
            args: Its arguments.
            kwargs: Its keyword arguments.
            node: The node that makes it.
            rule: What it is written for.
            found: None if it was written; else whether the node found is ours.
        """
        if self._is_spoiled or self._registers.get(node, -1) >= 0:
            return
        try:
            nodes = {i: arg for i, arg in enumerate(args) if isinstance(arg, fx.Node)}
            rest = tuple(None if i in nodes else arg for i, arg in enumerate(args))
            registers = {i: self._register(arg) for i, arg in nodes.items()}
            call = Call(
                target,
                rest,
                tuple(registers.items()),
                dict(kwargs),
                found,
                self._is_open(registers.values(), is_found=found is not None),
                layout_of(self._plain(node, (rest, kwargs))),
                node.meta["val"],
                None if found is not None else self._base(node.meta["val"], registers, nodes),
                self._rules.setdefault(rule, len(self._rules)),
            )
        except _NotRecordedError:
            return self.spoil()
        self._registers[node] = len(self._calls)
        self._calls.append(call)
        self._nodes.append(node)

    def asked(self, leaf: int, backward: bool, is_made: bool) -> None:
        """A leaf is needed as a matrix in a phase."""
        for role in self._shown_by(leaf, backward):
            self._asked.setdefault(role, is_made)

    def showed(self, leaf: int, backward: bool, node: fx.Node) -> None:
        """A leaf was made a matrix."""
        self._shown += [(role, node) for role in self._shown_by(leaf, backward)]

    def met(
        self, region: int, number: int, node: fx.Node, *, is_before: bool, facts: object
    ) -> None:
        """An incoming product was asked about."""
        for slot, given in enumerate(self._slots):
            if given.region == region:
                role = Role("came", slot, number)
                self._came[role] = Came(role, is_before, facts)
                self._roles.setdefault(node, []).append(role)

    def made(self, region: int, value: Value, node: fx.Node, *, transposed: bool) -> None:
        """A value was made."""
        for slot, given in enumerate(self._slots):
            if given.region == region:
                self._made.append((slot, value, node, transposed))
                return
        self.spoil()

    # -- the end -------------------------------------------------------------------------------

    def template(
        self,
        number: int,
        result: fx.Node,
        recomputed: Sequence[fx.Node],
        copied: Sequence[tuple[fx.Node, fx.Node]],
    ) -> Template | None:
        """All that was taken down; None if it does not say what an equal root needs."""
        if self._is_spoiled:
            return None
        try:
            return Template(
                number,
                self._slots,
                asked=tuple(self._asked.items()),
                came=tuple(self._came.values()),
                calls=tuple(self._calls),
                rules=tuple(tuple(map(self._own, rule)) for rule in self._rules),
                result=self._register(result),
                made=tuple(
                    Made(slot, value, self._register(node), transposed)
                    for slot, value, node, transposed in self._made
                ),
                shown=tuple((role, self._register(node)) for role, node in self._shown),
                recomputed=tuple(map(self._register, recomputed)),
                copied=tuple((self._register(a), self._register(b)) for a, b in copied),
                inputs=tuple(tuple(self._roles[node]) for node in self._inputs),
                nodes=(*self._nodes, *reversed(self._inputs)),
            )
        except _NotRecordedError:
            return None

    def _plain(self, node: fx.Node, literals: Any) -> torch.Tensor:
        """The example result of a call whose other arguments hold no node."""
        inside: list[fx.Node] = []
        fx.node.map_arg(literals, inside.append)
        value: torch.Tensor = node.meta["val"]
        if inside or not is_plain_fake(value, self._mode):
            raise _NotRecordedError
        return value

    def _is_open(self, registers: Iterable[int], *, is_found: bool) -> bool:
        """True if some node might make a call already: what no node holds yet is read by none."""
        is_open = all(r < 0 or self._calls[r].found is not None for r in registers)
        if is_found and not is_open:
            raise _NotRecordedError
        return is_open

    def _base(
        self, value: torch.Tensor, registers: Mapping[int, int], nodes: Mapping[int, fx.Node]
    ) -> int | None:
        """The register of the node whose memory a value is."""
        mine = storage_of(value)
        bases = {registers[i] for i, n in nodes.items() if storage_of(n.meta["val"]) == mine}
        if len(bases) > 1:
            raise _NotRecordedError
        return bases.pop() if bases else None

    def _register(self, node: fx.Node) -> int:
        if node not in self._registers:
            if node not in self._roles or not is_plain_fake(node.meta.get("val"), self._mode):
                raise _NotRecordedError
            self._inputs.append(node)
            self._registers[node] = -len(self._inputs)
        return self._registers[node]

    def _own(self, piece: str | Name) -> str | Name:
        """A piece of a rule with numbers of slots."""
        if isinstance(piece, str) or piece.kind == "root":
            return piece
        for i, slot in enumerate(self._slots):
            numbers = slot.scalars if piece.kind == "scalar" else slot.matrices
            if piece.kind != "assignment" and piece.number in numbers:
                return Name(piece.kind, numbers.index(piece.number), i)
        raise _NotRecordedError

    def _shown_by(self, leaf: int, backward: bool) -> Iterator[Role]:
        kind: Literal["forward", "backward"] = "backward" if backward else "forward"
        for i, slot in enumerate(self._slots):
            if leaf in slot.matrices:
                yield Role(kind, i, slot.matrices.index(leaf))
