"""Copies: a root that equals an earlier one gets copies of the nodes that were written for it.

    layer 0: emitted step by step, read back, proven       layer 1: the same nodes on its leaves

Models have equal layers. The first root of a key (:mod:`runlora_fx.passes.emit.copies.keys`) is
emitted from its plan and read back. Later roots of the key get copies of its nodes.

Why that is sound: the nodes of the first root compute its polynomial from the tensors that they
read. The other root has the same polynomial over its own leaves. Every tensor that is read has a
counterpart of the same layout: the leaf of the same number, the same product of the incoming graph,
the copy of the same node, or the node that makes the same call on counterparts. So the copies
compute the same polynomial over the leaves of the other root.

Copies are read back too, so that a wrong counterpart is found.

Invariant: every root is proven.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

from torch import fx

from runlora_fx._torch_compat import fake_mode_of, storage_of
from runlora_fx.passes.algebra.polynomials import normalise, substitute
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.emit.copies.keys import Keys, Slot
from runlora_fx.passes.emit.nodes.rules import Name, Rule, name_in, text_of
from runlora_fx.passes.emit.nodes.writer import Writer
from runlora_fx.passes.emit.proof.verify import verify
from runlora_fx.passes.emit.steps.emitter import Emitted, Emitter
from runlora_fx.passes.emit.steps.task import Laid, Task
from runlora_fx.passes.read.regions import Root

#: The largest number of nodes outside of its regions that a copied root may read.
_MOST_READ = 256


class _Written(NamedTuple):
    """A node that was written for a first root.

    Attributes:
        node: The node.
        base: The node that it is a view of; None if it is new memory.
        rule: The index of its rule in :attr:`_First.rules`.
    """

    node: fx.Node
    base: fx.Node | None
    rule: int


@dataclass(frozen=True)
class _First:
    """The first root of a key, as it was written.

    Attributes:
        number: A number of its own.
        slots: Its slots.
        emitted: What was written for it.
        read: The nodes that a copy needs counterparts of, in an order in which each stands behind
            what it reads; True beside a node that stands before the root.
        written: The nodes to copy, in order.
        rules: The rules that they were written for.
    """

    number: int
    slots: tuple[Slot, ...]
    emitted: Emitted
    read: tuple[tuple[fx.Node, bool], ...]
    written: tuple[_Written, ...]
    rules: tuple[Rule, ...]


class _Counterparts(NamedTuple):
    """For the nodes, leaves and scalar leaves of a first root, those of its copy."""

    nodes: dict[Any, Any]
    leaves: dict[int, int]
    scalars: dict[int, int]


class Copies:
    """Writes the roots of a graph: the first of every key step by step, the others as copies."""

    def __init__(self, task: Task, writer: Writer, emitter: Emitter) -> None:
        """Start before any root is written."""
        self._task = task
        self._writer = writer
        self._emitter = emitter
        self._reader = task.analysis.reader
        nodes = task.analysis.graph.nodes
        self._keys = Keys(task, fake_mode_of(node.meta.get("val") for node in nodes))
        self._firsts: defaultdict[Hashable, list[_First]] = defaultdict(list)
        self._count = 0
        # By region: its nodes of the incoming graph, then all that was written for it. Counterparts
        # of equal regions have equal places in these lists.
        self._nodes: dict[int, list[fx.Node | None]] = {}
        # By region, the copies whose values the emitter was not told yet.
        self._unknown: defaultdict[int, list[tuple[_First, _Counterparts]]] = defaultdict(list)
        # By copy whose form is not known yet, the node it is a copy of, and the counterparts.
        self._formless: dict[fx.Node, tuple[fx.Node, dict[Any, Any]]] = {}

    def write(self, root: Root) -> Emitted:
        """Write a root in front of the node that holds it now.

        Raises:
            EmissionError: If the plan cannot be expressed in this graph.
            VerificationError: If the written nodes do not compute the root.
        """
        key, slots = self._keys.key(root)
        self._writer.move_to(root.node)
        for first in () if key is None else self._firsts[key]:
            emitted = self.copied(first, root, slots)
            if emitted is not None:
                self._prove(emitted, root)
                return emitted
        return self._emitted(root, key, slots)

    def _prove(self, emitted: Emitted, root: Root) -> None:
        self._find_forms(emitted.node)
        verify(self._reader, emitted.node, root.node, root.polynomial)

    # -- the first of its kind -----------------------------------------------------------------

    def _emitted(self, root: Root, key: Hashable | None, slots: tuple[Slot, ...]) -> Emitted:
        """Write a root step by step, prove it, and remember it for its copies."""
        regions = [slot.region for slot in slots if slot.region is not None]
        for region in regions:
            self._task.take_up(region)
            self._catch_up(region)
        emitted = self._emitter.emit(root)
        self._prove(emitted, root)
        first = None if key is None else self._first(emitted, slots)
        for region in regions:
            self._of_region(region).extend(emitted.written)
        self._keys.advance(slots, None if first is None else first.number)
        if first is not None and self._keys.layout(emitted.node) == self._keys.layout(root.node):
            self._firsts[key].append(first)
        return emitted

    def _first(self, emitted: Emitted, slots: tuple[Slot, ...]) -> _First | None:
        """A root as the first of its key; None if it cannot be copied."""
        known = {node for slot in slots for node in self._held(slot)}
        read = _made_of(emitted, known)
        if read is None or any(self._keys.layout(node) is None for node in read):
            return None
        rules: dict[Rule, int] = {}
        written: list[_Written] = []
        for node in emitted.written:
            if self._keys.layout(node) is None:
                return None
            memory = storage_of(node.meta["val"])
            bases = [n for n in node.all_input_nodes if storage_of(n.meta["val"]) == memory]
            if len(bases) > 1 or node.op != "call_function":
                return None
            rule = rules.setdefault(self._writer.rules[node], len(rules))
            written.append(_Written(node, bases[0] if bases else None, rule))
        self._count += 1
        stands = tuple((node, emitted.met.get(node, True)) for node in read)
        return _First(self._count, slots, emitted, stands, tuple(written), tuple(rules))

    # -- copies --------------------------------------------------------------------------------

    def copied(self, first: _First, root: Root, slots: tuple[Slot, ...]) -> Emitted | None:
        """Write a root as a copy of another; None if something has no counterpart."""
        there = self._counterparts(first, slots)
        if there is None:
            return None
        nodes, leaves, scalars = there
        layouts, copies = self._keys.layouts, list[fx.Node]()

        def named(name: Name) -> str:
            kind, number = name
            if kind in ("matrix", "scalar"):
                name = Name(kind, (leaves if kind == "matrix" else scalars).get(number, number))
            return name_in(self._reader.leaves, name, root.node.name)

        texts = [text_of(rule, named) for rule in first.rules]
        for was, base, rule in first.written:
            shown = None if base is None else nodes[base]
            node = self._writer.again(was, nodes, layouts[was], shown, texts[rule])
            if layouts.setdefault(node, layouts[was]) != layouts[was]:
                return None
            nodes[was] = node
            copies.append(node)
            if node not in self._reader.forms:
                self._formless[node] = (was, nodes)
        for slot in slots:
            if slot.region is not None:
                self._of_region(slot.region).extend(copies)
                self._unknown[slot.region].append((first, there))
        self._keys.advance(slots, first.number)
        return first.emitted.on(nodes)

    def _counterparts(self, first: _First, slots: tuple[Slot, ...]) -> _Counterparts | None:
        """The counterparts of everything that a first root reads; None if one is missing."""
        there = nodes, leaves, scalars = _Counterparts({}, {}, {})
        for was, slot in zip(first.slots, slots, strict=True):
            leaves.update(zip(was.matrices, slot.matrices, strict=True))
            scalars.update(zip(was.scalars, slot.scalars, strict=True))
            # The first region's list may be longer: other roots may have been written since.
            for one, other in zip(self._held(was), self._held(slot), strict=False):
                if nodes.setdefault(one, other) is not other:
                    return None
        for node, is_before in first.read:
            if node not in nodes:
                nodes[node] = self._writer.find_again(node, nodes)
            other = nodes[node]
            if other is None or self._writer.is_before(other) != is_before:
                return None
            if self._keys.layout(other) != self._keys.layout(node):
                return None
        return there

    def _held(self, slot: Slot) -> Sequence[fx.Node | None]:
        """The nodes of a slot; equal slots have counterparts in equal places."""
        if slot.region is not None:
            return self._of_region(slot.region)
        leaves = self._reader.leaves
        held = [leaves.matrices[leaf].node for leaf in slot.matrices]
        return [*held, *[leaves.scalars[scalar].node for scalar in slot.scalars]]

    def _of_region(self, region: int) -> list[fx.Node | None]:
        found = self._nodes.get(region)
        if found is None:
            posed = self._task.analysis.posed[region]
            came = self._task.analysis.regions.regions[region].incoming
            found = [*self._held(Slot(None, posed.matrices, posed.scalars))]
            found += [made.node for made in came]
            self._nodes[region] = found
        return found

    # -- what was copied, for what is emitted step by step ----------------------------------------

    def _catch_up(self, region: int) -> None:
        """Tell the emitter which copies hold which values of a region."""
        for first, (nodes, leaves, scalars) in self._unknown.pop(region, ()):
            for value, laid in first.emitted.values:
                _, turned, core = normalise(substitute(value.core, leaves, scalars))
                there = Laid(nodes[laid.node], laid.transposed != turned)
                self._emitter.know(Value(core, value.backward), there)

    def _find_forms(self, node: fx.Node) -> None:
        """Derive the forms of the copies that a node depends on, so that it can be read back."""
        pending, seen = [node], set[fx.Node]()
        while pending:
            node = pending.pop()
            if node in seen or node not in self._writer.own:
                continue
            seen.add(node)
            pending.extend(node.all_input_nodes)
            if node in self._formless:
                was, nodes = self._formless.pop(node)
                self._find_forms(was)
                if was in self._writer.claimed:
                    self._writer.claim(node, _on_nodes(self._reader.forms[was], nodes))
                else:
                    self._reader.classify(node)


def _made_of(emitted: Emitted, known: Collection[fx.Node | None]) -> list[fx.Node] | None:
    """The nodes that a root depends on and that were not written for it.

    Args:
        emitted: The root.
        known: Nodes that have counterparts already; what they read does not matter.

    Returns:
        The nodes, each behind what it reads. None if there are too many, or if a node that is not
        known is no call of a function.
    """
    found = dict[fx.Node, None].fromkeys(emitted.met)
    written = set(emitted.written)
    pending = [node for top in emitted.written for node in top.all_input_nodes]
    pending += emitted.held
    while pending:
        node = pending[-1]
        below: list[fx.Node] = []
        if node not in known and node not in written:
            if node.op != "call_function" or len(pending) + len(found) > _MOST_READ:
                return None
            if not written.isdisjoint(node.all_input_nodes):
                return None
            below = [source for source in node.all_input_nodes if source not in found]
        if below:
            pending += below
            continue
        pending.pop()
        if node not in written:
            found[node] = None
    return list(found)


def _on_nodes(x: Any, nodes: Mapping[fx.Node, fx.Node]) -> Any:
    """A form, or a part of one, with every node replaced by its counterpart."""
    if isinstance(x, fx.Node):
        return nodes.get(x, x)
    if isinstance(x, tuple):
        parts = [_on_nodes(y, nodes) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if is_dataclass(x) and not isinstance(x, type):
        changed = {field.name: _on_nodes(getattr(x, field.name), nodes) for field in fields(x)}
        return replace(x, **changed)
    return x
