"""Tasks: the plans to write, translated from the leaf numbers of problems to those of the graph.

    plans of two regions      ->      the roots that change, and for each region its steps and the
                                      nodes of the incoming graph that already compute one of them

A problem numbers its leaves by itself, so that equal layers have one problem. Most roots equal an
earlier one and are written as its copy (:mod:`runlora_fx.passes.emit.copies`), without the numbers
of the graph. So a region is translated only when a root of it is emitted step by step
(:meth:`Task.take_up`).

Invariant: what a task says about a region does not depend on which other regions were taken up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from torch import fx

from runlora_fx.passes.algebra.implementations import named
from runlora_fx.passes.algebra.plan import Plan
from runlora_fx.passes.algebra.polynomials import IDENTITY, Polynomial, normalise
from runlora_fx.passes.algebra.problem import Problem, Value
from runlora_fx.passes.algebra.steps import Keep, Step
from runlora_fx.passes.algebra.sums import accumulated
from runlora_fx.passes.read.analysis import Analysis
from runlora_fx.passes.read.reader import GraphReader


class Laid(NamedTuple):
    """A node that holds a value, or its transpose if ``transposed`` is True."""

    node: fx.Node
    transposed: bool


class Task:
    """What is to be emitted into one graph.

    Attributes:
        analysis: The graph as it came.
        plans: The plan of each region, by its index. The other regions stay as they came.
        roots: All roots that are emitted, in graph order.
        places: By root and part of it, the index of the part's region and its place among the
            demands of that region.
        steps: By value, its step. Like all that follow, for the regions that were taken up.
        implementations: By value, the name of the implementation of its step.
        lies: By polynomial of a value, True if the value is stored transposed.
        existing: By value and step, the node of the incoming graph that computes it so.
        uses: By value, the number of its readers: steps of both phases, and roots.
    """

    def __init__(self, analysis: Analysis, plans: Mapping[int, Plan]) -> None:
        """The task of putting plans into a graph; no region is taken up yet.

        Args:
            analysis: The graph as it came.
            plans: The plan of each region, by its index. The other regions stay as they came.
        """
        self.analysis = analysis
        self.plans = plans
        regions = analysis.regions
        touched = {root.node for i in plans for root, _ in regions.regions[i].demands}
        # A root that is also a part of a region without a problem has no steps for that part.
        touched -= {root.node for region, _ in analysis.failures for root, _ in region.demands}
        self.roots = tuple(root for root in regions.roots if root.node in touched)
        self.places = {
            (root.node, part): (i, k)
            for i, region in enumerate(regions.regions)
            for k, (root, part) in enumerate(region.demands)
            if root.node in touched
        }
        self.steps: dict[Value, Step] = {}
        self.implementations: dict[Value, str] = {}
        self.lies: dict[Polynomial, bool] = {}
        self.existing: dict[tuple[Value, Step], Laid] = {}
        self.uses: Counter[Value] = Counter()
        self._incoming: set[tuple[Value, Step]] = set()
        self._taken: set[int] = set()

    # -- regions -------------------------------------------------------------------------------

    def take_up(self, region: int) -> None:
        """Translate the plan of a region and its incoming steps to the graph's leaf numbers."""
        if region in self._taken:
            return
        self._taken.add(region)
        posed = self.analysis.posed[region]
        # A sum also counts as the ``addmm`` that would compute it.
        came = [posed.step_in_graph(value, step) for value, step in _all_steps(posed.problem)]
        plan = posed.in_graph(self.plans.get(region) or _as_it_came(posed.problem))
        self.steps.update(plan.steps)
        self.implementations.update(plan.implementations)
        self.lies.update(plan.lies or {})
        self._incoming.update(came)
        self._count_uses(region, plan)
        self._find_existing(region)

    def _count_uses(self, region: int, plan: Plan) -> None:
        for root, part in self.analysis.regions.regions[region].demands:
            if (root.node, part) in self.places:
                self.uses[self.value(normalise(part).core, root.backward)] += 1
        for value, step in plan.steps.items():
            if isinstance(step, Keep):
                self.uses[Value(value.core, False)] += 1
            else:
                operands = (normalise(p).core for p in step.operands)
                self.uses.update(self.value(core, value.backward) for core in operands)

    def _find_existing(self, region: int) -> None:
        """Find the products inside the region, so that equal steps of the plan can reuse them."""
        reader = self.analysis.reader
        for made in self.analysis.regions.regions[region].incoming:
            is_plain = reader.forms[made.node].is_product
            if not (made.is_product and is_plain) or made.node in reader.stops:
                continue
            scalar, transposed, core = normalise(made.polynomial)
            if not scalar.is_one or _reads_identity(reader, made.node):
                continue  # reusing it would keep a product with the identity matrix alive
            step = made.step.making(made.polynomial)
            laid = Laid(made.node, transposed)
            self.existing.setdefault((Value(core, made.backward), step), laid)

    # -- questions -----------------------------------------------------------------------------

    def value(self, core: Polynomial, backward: bool) -> Value:
        """The value of a normalised polynomial: one that reads a gradient is of the backward."""
        matrices, gradients = self.analysis.reader.leaves.matrices, self.analysis.phases.gradients
        nodes = (node for i in core.leaves for node in matrices[i].sources)
        return Value(core, backward or any(node in gradients for node in nodes))

    def is_alike(self, one: Value, other: Value) -> bool:
        """True if two values have equal steps and equal implementations."""
        steps, names = self.steps, self.implementations
        return steps.get(one) == steps.get(other) and names.get(one) == names.get(other)

    def came(self, value: Value, step: Step) -> bool:
        """True if the incoming graph computes a value by a step, and the plan runs it alike."""
        return self.runs_as_usual(value) and (value, step) in self._incoming

    def runs_as_usual(self, value: Value) -> bool:
        """True if the plan runs the step of a value as ordinary graphs do."""
        return named(self.implementations[value]).is_usual

    def came_so(self, value: Value, step: Step) -> bool:
        """True if the incoming graph computes the operands of a step as the plan does.

        Otherwise reusing its node would keep other nodes alive that compute the same operands.
        """
        for p in step.operands:
            below = self.value(normalise(p).core, value.backward)
            planned = self.steps.get(below)
            if isinstance(planned, Keep):
                below = Value(below.core, False)
                planned = self.steps.get(below)
            if planned is not None and not (
                self.came(below, planned) and self.came_so(below, planned)
            ):
                return False
        return True


@lru_cache(maxsize=4096)
def _as_it_came(problem: Problem) -> Plan:
    """A region that has no plan, as a plan: the first incoming step of every value."""
    first: dict[Value, Step] = {}
    for value, step in problem.incoming:
        first.setdefault(value, step)
    return accumulated(problem, Plan(first)).laid(problem)


@lru_cache(maxsize=4096)
def _all_steps(problem: Problem) -> tuple[tuple[Value, Step], ...]:
    """Every step of the incoming graph, and the ``addmm`` steps that its sums could be."""
    steps = (*problem.incoming, *_as_it_came(problem).steps.items())
    return tuple(dict.fromkeys(steps))


def _reads_identity(reader: GraphReader, node: fx.Node) -> bool:
    """True if a node, or what it reads, is a product with the identity matrix."""
    form = reader.forms.get(node)
    if form is None:
        return False
    factors = (operand for product in form.products for operand in product.operands(reader))
    if any(p == IDENTITY for operand in factors for p in operand):
        return True
    return any(
        _reads_identity(reader, source)
        for source in form.sources
        if source in reader.cuts and source not in reader.stops
    )
