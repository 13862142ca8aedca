"""Keys: two roots with equal keys may be written as copies of each other.

    root of layer 1      ->      (its layout, the demands of its regions that it consists of, a
                                 number for each region): equal to the key of layer 0

A root is a sum of parts. A part belongs to a region, or needs no computation, such as a bias. A
*slot* is a numbering of leaves: that of a region, or that of a part that is in no region.

Invariant: two roots of one key have equal polynomials over their own leaves, equal plans, and
leaves of equal layouts. For the regions of both, equal nodes were written before.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import fx

from runlora_fx._torch_compat import is_plain_fake
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.emit.nodes.example_results import Layout, layout_of
from runlora_fx.passes.emit.steps.task import Task
from runlora_fx.passes.levels.origins import Held, OnesColumn
from runlora_fx.passes.levels.sizes import example_of
from runlora_fx.passes.read.regions import Root


class Slot(NamedTuple):
    """A numbering of leaves: that of a region, or of a part of a root that is in no region.

    Attributes:
        region: The index of the region; None for a part that is in none.
        matrices: By number in the slot, the number of the leaf in the graph.
        scalars: The same for scalar leaves.
    """

    region: int | None
    matrices: tuple[int, ...]
    scalars: tuple[int, ...]


class Keys:
    """The keys of the roots of a graph, while they are written.

    Attributes:
        layouts: By node, the layout of its tensor; None if a size is symbolic.
    """

    def __init__(self, task: Task, mode: Any) -> None:
        """Start before any root is written.

        Args:
            task: What is to be written.
            mode: The fake mode of the example values.
        """
        self._task = task
        self._mode = mode
        self._cuts = task.analysis.reader.cuts
        self._leaves = task.analysis.reader.leaves
        # By region, a number for the sequence of what was written for it so far. Equal sequences
        # have equal numbers. None if a root was written that has no key.
        self._states: dict[int, int | None] = {}
        self._numbers: dict[Hashable, int] = {}
        self._facts: dict[int, Hashable | None] = {}
        self.layouts: dict[fx.Node, Layout | None] = {}

    def key(self, root: Root) -> tuple[Hashable | None, tuple[Slot, ...]]:
        """The key of a root, None if it cannot be copied; and the slots of the root."""
        slots: dict[Slot, int] = {}
        parts: list[tuple[int, Hashable]] = []
        for part in root.parts:
            place = self._task.places.get((root.node, part))
            slot, number = self._own_slot(part) if place is None else self._in_region(*place)
            parts.append((slots.setdefault(slot, len(slots)), number))
        states = [self._state(slot) for slot in slots]
        layout = self.layout(root.node)
        if layout is None or None in states:
            return None, tuple(slots)
        return (layout, root.backward, self._cuts[root.node], *parts, *states), tuple(slots)

    def advance(self, slots: tuple[Slot, ...], written: int | None) -> None:
        """Take note that a root was written.

        Args:
            slots: The slots of the root.
            written: A number that is equal for a root and its copies; None for any other root.
        """
        for i, slot in enumerate(slots):
            if slot.region is not None:
                state = self._states[slot.region]
                is_known = written is not None and state is not None
                self._states[slot.region] = self._number((state, written, i)) if is_known else None

    def layout(self, node: fx.Node) -> Layout | None:
        """The layout of a node's tensor; None if a size is symbolic."""
        if node not in self.layouts:
            value = example_of(node)
            is_plain = value is not None and is_plain_fake(value, self._mode)
            self.layouts[node] = layout_of(value) if is_plain and value is not None else None
        return self.layouts[node]

    def _in_region(self, region: int, demand: int) -> tuple[Slot, Hashable]:
        posed = self._task.analysis.posed[region]
        return Slot(region, posed.matrices, posed.scalars), demand

    def _own_slot(self, part: Polynomial) -> tuple[Slot, Hashable]:
        number, matrices, scalars, assignments = self._task.analysis.patterns.of(part)
        return Slot(None, matrices, scalars), (number, assignments)

    def _state(self, slot: Slot) -> int | None:
        """A number for a slot and all that was written for it; None if it cannot be copied."""
        if slot.region is None:
            leaves = [self._leaves.matrices[i] for i in slot.matrices]
            sizes = [(leaf.batch, leaf.rows, leaf.cols, leaf.batched) for leaf in leaves]
            return self._start(slot, tuple(sizes))
        if slot.region not in self._states:
            self._states[slot.region] = self._start_of(slot.region, slot)
        return self._states[slot.region]

    def _start_of(self, region: int, slot: Slot) -> int | None:
        analysis, task = self._task.analysis, self._task
        posed = analysis.posed[region]
        if posed.assignments:
            return None
        # Equal regions share one problem object, which has the polynomials that they demand.
        demands = analysis.regions.regions[region].demands
        touched = tuple([(root.node, part) in task.places for root, part in demands])
        return self._start(slot, (id(posed.problem), id(task.plans.get(region)), touched))

    def _start(self, slot: Slot, what: Hashable) -> int | None:
        """A number for a slot before anything is written for it."""
        leaves = [self._facts_of(leaf) for leaf in slot.matrices]
        scalars = [self._leaves.scalars[i] for i in slot.scalars]
        layouts = [(scalar.inverse, self.layout(scalar.node)) for scalar in scalars]
        if None in leaves or any(layout is None for _, layout in layouts):
            return None
        # Sums are added up in the order of their leaves' numbers.
        ranks = (_ranks(slot.matrices), _ranks(slot.scalars))
        return self._number((what, tuple(leaves), tuple(layouts), ranks))

    def _facts_of(self, number: int) -> Hashable | None:
        """Everything about the tensor of a leaf but its name; None if it cannot be copied."""
        if number not in self._facts:
            origin, found = self._leaves.matrices[number].origin, None
            if isinstance(origin, Held):
                found = self.layout(origin.node)
            self._facts[number] = "ones" if isinstance(origin, OnesColumn) else found
        return self._facts[number]

    def _number(self, key: Hashable) -> int:
        """A number for a key, the same for equal ones."""
        return self._numbers.setdefault(key, len(self._numbers))


def _ranks(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The indices of some numbers, sorted by number."""
    return tuple(sorted(range(len(numbers)), key=numbers.__getitem__))
