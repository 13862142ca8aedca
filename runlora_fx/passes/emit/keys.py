"""Keys: what two roots must have in common for one to be written as the other was.

    the root of layer 1      ->      (its layout, its parts in numbers of their regions,
                                     for each region a number): the same as for layer 0

Invariant: a key holds all that writing and proving a root depends on, but for what a template asks
of the rest of the graph (:mod:`runlora_fx.passes.emit.replay`).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import fx

from runlora_fx._torch_compat import is_plain_fake
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.emit.example_results import Layout, layout_of
from runlora_fx.passes.emit.recording import Slot, Template
from runlora_fx.passes.emit.task import Task, numbered
from runlora_fx.passes.levels.origins import Held, OnesColumn
from runlora_fx.passes.levels.sizes import example_of
from runlora_fx.passes.read.regions import Root


class Keys:
    """The keys of the roots of a graph, as it is written.

    Attributes:
        layouts: The layouts of tensors of known sizes; None for any other tensor.
    """

    def __init__(self, task: Task, mode: Any) -> None:
        """Nothing is written yet.

        Args:
            task: What is to be written.
            mode: The fake mode that example values live in.
        """
        self._task = task
        self._mode = mode
        self._reader = task.analysis.reader
        self._leaves = task.analysis.reader.leaves
        # By region, a number that stands for all that was written for it so far. None if some of
        # it has no template.
        self._states: dict[int, int | None] = {}
        self._numbers: dict[Hashable, int] = {}
        self._facts: dict[int, int | None] = {}
        self.layouts: dict[fx.Node, Layout | None] = {}

    def advance(self, region: int, template: Template | None, slot: int) -> None:
        """Take note that a root was written for a region."""
        state = self._states[region]
        known = None if template is None or state is None else (state, template.number, slot)
        self._states[region] = None if known is None else self._number(known)

    def key(self, root: Root) -> tuple[Hashable | None, tuple[Slot, ...]]:
        """What equal roots have in common, None if that is not known; and the slots of a root."""
        slots: list[Slot] = []
        parts: list[Hashable] = []
        states: list[int | None] = []
        for part in root.parts:
            place = self._task.places.get((root.node, part))
            region = None if place is None else place[0]
            slot = self._slot(region, part)
            if slot not in slots:
                slots.append(slot)
                states.append(self._start(slot) if region is None else self._state(region, slot))
            parts.append(
                (
                    slots.index(slot),
                    numbered(part, slot.matrices, slot.scalars) if place is None else place[1],
                )
            )
        layout = self.layout(root.node)
        if layout is None or None in states:
            return None, tuple(slots)
        first: dict[int, int] = {}
        joint = [leaf for slot in slots for leaf in slot.matrices] if len(slots) > 1 else ()
        pattern = tuple([first.setdefault(leaf, len(first)) for leaf in joint])
        key = (layout, root.backward, self._reader.cuts[root.node], *parts, *states, pattern)
        return key, tuple(slots)

    def _slot(self, region: int | None, part: Polynomial) -> Slot:
        if region is not None:
            posed = self._task.analysis.posed[region]
            return Slot(region, posed.matrices, posed.scalars)
        leaves = dict.fromkeys(factor.leaf for word in part.words for factor in word.factors)
        scalars = dict.fromkeys(scalar for word in part.words for scalar in word.scalars)
        return Slot(None, tuple(leaves), tuple(scalars))

    def _state(self, region: int, slot: Slot) -> int | None:
        if region not in self._states:
            task, posed = self._task, self._task.analysis.posed[region]
            start = None if posed.assignments else self._start(slot)
            if start is not None:
                demands = tuple(
                    [
                        (root.backward, numbered(part, slot.matrices, slot.scalars))
                        for root, part in task.analysis.regions.regions[region].demands
                        if (root.node, part) in task.places
                    ]
                )
                plan = task.plans.get(region)
                start = self._number((start, posed.problem, id(plan), demands))
            self._states[region] = start
        return self._states[region]

    def _start(self, slot: Slot) -> int | None:
        """What the leaves of a slot are, but for their numbers; None if that is not known."""
        leaves = [self._facts_of(leaf) for leaf in slot.matrices]
        scalars = [
            (self._leaves.scalars[s].inverse, self.layout(self._leaves.scalars[s].node))
            for s in slot.scalars
        ]
        if None in leaves or any(layout is None for _, layout in scalars):
            return None
        nodes: dict[fx.Node | None, int] = {}
        held = [self._leaves.matrices[leaf].node for leaf in slot.matrices]
        return self._number(
            (
                tuple(leaves),
                tuple(scalars),
                # Equal polynomials are sorted in equal ways if the numbers of leaves are.
                _ranks(slot.matrices),
                _ranks(slot.scalars),
                tuple([nodes.setdefault(node, len(nodes)) for node in held]),
            )
        )

    def _facts_of(self, number: int) -> int | None:
        """What is known of a leaf, but for its number; None if that is not all."""
        if number not in self._facts:
            leaf = self._leaves.matrices[number]
            facts: Hashable = None
            if isinstance(leaf.origin, OnesColumn) and isinstance(leaf.rows, int):
                facts = ("ones", leaf.rows)
            elif isinstance(leaf.origin, Held):
                layout = self.layout(leaf.origin.node)
                sizes = (leaf.batch, leaf.rows, leaf.cols, leaf.batched, leaf.diagonal)
                facts = None if layout is None else (layout, sizes)
            self._facts[number] = None if facts is None else self._number(facts)
        return self._facts[number]

    def layout(self, node: fx.Node) -> Layout | None:
        """The layout of a tensor of known sizes."""
        if node not in self.layouts:
            value = example_of(node)
            is_plain = value is not None and is_plain_fake(value, self._mode)
            self.layouts[node] = layout_of(value) if is_plain and value is not None else None
        return self.layouts[node]

    def _number(self, key: Hashable) -> int:
        """A number for a key, the same for equal ones."""
        return self._numbers.setdefault(key, len(self._numbers))


def _ranks(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The order of some numbers."""
    return tuple(sorted(range(len(numbers)), key=numbers.__getitem__))
