"""Replays: an equal root is written by making the calls again that were made for the first one.

    layer 0: emitted step by step, read back, proven        layer 1: the same calls on its own nodes

Models have equal layers. The first root of a kind is emitted from its plan and read back, and a
:class:`~runlora_fx.passes.emit.recording.Template` is taken down. Another root of the same *key*
gets the calls of the template, without planning, measuring or reading them.

Why that is sound. The key of a root holds its polynomial, the problems and plans of its regions,
what was written for them before, and the shape, strides, dtype and device of the root and of every
leaf, all in numbers of its own regions. What a template says of the rest of the graph is asked
again: which equal calls are there, and which products of the incoming graph can be taken. So the
calls of the template, made on the nodes of the same roles, have the same forms over the same
leaves, up to the numbers of leaves. What was proven of the first root by reading it back is the
same statement about the other one.

Invariant: a replayed root is, name by name, what would be written for it step by step. Where that
is not known nothing is replayed.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import fx

from runlora_fx._torch_compat import fake_mode_of
from runlora_fx.passes.algebra.polynomials import normalise, substitute
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.emit.emitter import Emitter
from runlora_fx.passes.emit.keys import Keys
from runlora_fx.passes.emit.recording import Recording, Role, Slot, Template
from runlora_fx.passes.emit.rules import Name, name_in, text_of
from runlora_fx.passes.emit.task import Laid, Task
from runlora_fx.passes.emit.writer import Writer
from runlora_fx.passes.read.regions import Root


class Replays:
    """Writes the roots of a graph, each kind step by step only once."""

    def __init__(self, task: Task, writer: Writer, emitter: Emitter) -> None:
        """Nothing is known yet."""
        analysis = task.analysis
        self._task = task
        self._writer = writer
        self._emitter = emitter
        self._reader = analysis.reader
        self._leaves = analysis.reader.leaves
        self._mode: Any = fake_mode_of(node.meta.get("val") for node in analysis.graph.nodes)
        self._keys = Keys(task, self._mode)
        self._templates: dict[Hashable, list[Template]] = {}
        # By region, the replays whose values the emitter does not know yet.
        self._unknown: dict[int, list[tuple[Template, int, Slot, list[fx.Node]]]] = {}
        self._made = 0
        self._formless: dict[fx.Node, tuple[Template, int, list[fx.Node]]] = {}
        self._seen: set[fx.Node] = set()

    # -- writing -------------------------------------------------------------------------------

    def replayed(self, root: Root) -> fx.Node | None:
        """Write a root by the template of an equal one; None if there is none.

        Nothing is written where None is returned.
        """
        key, slots = self._keys.key(root)
        self._writer.move_to(root.node)
        for template in self._templates.get(key, ()):
            registers = self._registers(template, slots)
            if registers is not None:
                self._write(template, slots, registers, root)
                self._settle(template, slots, registers)
                new: fx.Node = registers[template.result]
                return new
        return None

    def emitted(self, root: Root) -> fx.Node:
        """Write a root step by step and take that down for equal ones; it is still to be proven."""
        key, slots = self._keys.key(root)
        for slot in slots:
            if slot.region is not None:
                self._task.take_up(slot.region)
                self._catch_up(slot.region)
        recording = None
        if key is not None:
            recording = Recording(slots, self._roles(slots), self._mode)
        emitter, writer = self._emitter, self._writer
        recomputed, copied = len(emitter.recomputed), len(emitter.copied)
        writer.recording = recording
        try:
            new = emitter.emit(root)
        finally:
            writer.recording = None
        template = None
        if recording is not None and self._keys.layout(new) == self._keys.layout(root.node):
            again, copies = emitter.recomputed[recomputed:], [*emitter.copied.items()][copied:]
            template = recording.template(self._made, new, again, copies)
            self._made += 1
        for slot in slots:
            if slot.region is not None:
                self._keys.advance(slot.region, template, slots.index(slot))
        if template is not None:
            self._templates.setdefault(key, []).append(template)
        self._read(new)
        return new

    def _read(self, node: fx.Node) -> None:
        """Find the forms of what was replayed below a node, which is to be read."""
        pending = [node]
        while pending:
            node = pending.pop()
            if node in self._seen or node not in self._writer.own:
                continue
            self._seen.add(node)
            pending.extend(node.all_input_nodes)
            known = self._formless.pop(node, None)
            if known is not None:
                template, call, registers = known
                form = template.form(call, registers, self._reader.forms)
                if form is not None:
                    self._reader.forms[node] = form

    # -- replaying -----------------------------------------------------------------------------

    def _registers(self, template: Template, slots: tuple[Slot, ...]) -> list[Any] | None:
        """The nodes that are there already, and None for those to write.

        Returns:
            None altogether if the rest of the graph answers otherwise than for the template.
        """
        shown = self._emitter.shown
        for role, was_made in template.asked:
            key = (slots[role.slot].matrices[role.number], role.kind == "backward")
            if (key in shown) != was_made:
                return None
        for came in template.came:
            node, region = self._node(came.role, slots), slots[came.role.slot].region
            assert region is not None
            is_before = self._writer.is_before(node)
            facts = self._task.facts_at(region, came.role.number)
            if is_before != came.is_before or facts != came.facts:
                return None
        inputs: list[fx.Node] = []
        for roles in template.inputs:
            node, *others = [self._node(role, slots) for role in roles]
            if any(other is not node for other in others):
                return None
            inputs.append(node)
        # The inputs stand at the end, in reverse: their registers are negative.
        registers: list[Any] = [None] * len(template.calls) + inputs[::-1]
        for i, call in enumerate(template.calls):
            if not call.is_open:
                continue
            known = self._writer.find(call.target, call.arguments(registers), call.kwargs)
            if (known is None) != (call.found is None):
                return None
            if known is not None:
                if (known in self._writer.own) != call.found or self._keys.layout(
                    known
                ) != call.layout:
                    return None
                registers[i] = known
        return registers

    def _write(
        self, template: Template, slots: tuple[Slot, ...], registers: list[Any], root: Root
    ) -> None:
        """Make the calls that are not there."""

        def named(name: Name) -> str:
            if name.kind != "root":
                slot = slots[name.slot]
                numbers = slot.scalars if name.kind == "scalar" else slot.matrices
                name = Name(name.kind, numbers[name.number])
            return name_in(self._leaves, name, root.node.name)

        texts = [text_of(rule, named) for rule in template.rules]
        for i, call in enumerate(template.calls):
            if registers[i] is None:
                base = None if call.view_of is None else registers[call.view_of].meta["val"]
                node = self._writer.again(call, call.arguments(registers), base, texts[call.rule])
                self._keys.layouts[node] = call.layout
                self._formless[node] = (template, i, registers)
                registers[i] = node

    def _settle(self, template: Template, slots: tuple[Slot, ...], registers: list[Any]) -> None:
        """Take note of what was written, as if it had been written step by step."""
        emitter = self._emitter
        for role, register in template.shown:
            leaf = slots[role.slot].matrices[role.number]
            emitter.shown[leaf, role.kind == "backward"] = registers[register]
        for made in template.made:
            region = slots[made.slot].region
            assert region is not None
            emitter.made[region].append(registers[made.register])
        emitter.recomputed += [registers[i] for i in template.recomputed]
        emitter.copied.update((registers[a], registers[b]) for a, b in template.copied)
        for i, slot in enumerate(slots):
            if slot.region is not None:
                self._unknown.setdefault(slot.region, []).append((template, i, slot, registers))
                self._keys.advance(slot.region, template, i)

    def _catch_up(self, region: int) -> None:
        """Tell the emitter of the values that were replayed."""
        for template, i, slot, registers in self._unknown.pop(region, ()):
            was = template.slots[i]
            leaves = dict(zip(was.matrices, slot.matrices, strict=True))
            scalars = dict(zip(was.scalars, slot.scalars, strict=True))
            for made in template.made:
                if made.slot == i:
                    core = normalise(substitute(made.value.core, leaves, scalars)).core
                    laid = Laid(registers[made.register], made.transposed)
                    self._emitter.know(Value(core, made.value.backward), laid)

    # -- roles ---------------------------------------------------------------------------------

    def _node(self, role: Role, slots: tuple[Slot, ...]) -> fx.Node:
        """The node that has a role."""
        slot = slots[role.slot]
        if role.kind == "scalar":
            return self._leaves.scalars[slot.scalars[role.number]].node
        if role.kind == "leaf":
            held = self._leaves.matrices[slot.matrices[role.number]].node
            assert held is not None
            return held
        if role.kind in ("forward", "backward"):
            return self._emitter.shown[slot.matrices[role.number], role.kind == "backward"]
        assert slot.region is not None
        if role.kind == "made":
            return self._emitter.made[slot.region][role.number]
        return self._task.analysis.regions.regions[slot.region].incoming[role.number].node

    def _roles(self, slots: tuple[Slot, ...]) -> dict[fx.Node, list[Role]]:
        """What each node is to a root that is to be written."""
        found: dict[fx.Node, list[Role]] = {}
        for i, slot in enumerate(slots):
            roles = [
                Role("leaf", i, k)
                for k, leaf in enumerate(slot.matrices)
                if self._leaves.matrices[leaf].node is not None
            ]
            roles += [Role("scalar", i, k) for k in range(len(slot.scalars))]
            for k, leaf in enumerate(slot.matrices):
                roles += [Role("forward", i, k)] if (leaf, False) in self._emitter.shown else []
                roles += [Role("backward", i, k)] if (leaf, True) in self._emitter.shown else []
            if slot.region is not None:
                made = self._emitter.made[slot.region]
                roles += [Role("made", i, k) for k in range(len(made))]
            for role in roles:
                found.setdefault(self._node(role, slots), []).append(role)
        return found
