"""Tasks: what is to be emitted, as data in the numbers of the graph's leaves.

    plans of two regions      ->      the roots that they touch; once a root of a region is to be
                                      written, its steps, and the nodes that already compute one

Regions have problems with numbers of their own, and most regions equal another one. A root that
equals another is written as its copy (:mod:`runlora_fx.passes.emit.copies`). So the numbers of the
graph are put into a plan only where a root is emitted step by step.

Invariant: a task says nothing of what the emitted nodes look like. What it says of a region does
not depend on which other regions were taken up.
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
    """A node that holds a value, or the transpose of it."""

    node: fx.Node
    transposed: bool


class Task:
    """What is to be emitted into one graph.

    Attributes:
        analysis: The graph as it came.
        plans: By the index of a region, what to compute it by; the others stay as they came.
        roots: All roots that are emitted, in graph order.
        places: By root and part of it, the region of the part and which of its demands it is.
        steps: Of the regions taken up: a step for every value that the roots need.
        implementations: What runs each step, by name.
        lies: By value that has a step, whether it is computed transposed.
        existing: Nodes of the incoming graph that compute a value by a step.
        uses: How often each value is read, by steps of either phase and by roots.
    """

    def __init__(self, analysis: Analysis, plans: Mapping[int, Plan]) -> None:
        """The task of putting plans into a graph; no region is taken up yet."""
        self.analysis = analysis
        self.plans = plans
        regions = analysis.regions
        touched = {root.node for i in plans for root, _ in regions.regions[i].demands}
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
        """Put the numbers of the graph into the plan of a region, and into its incoming steps."""
        if region in self._taken:
            return
        self._taken.add(region)
        posed = self.analysis.posed[region]
        # Sums also as they accumulate.
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
        """Find interior nodes that are products: a plan that makes the same can take them."""
        reader = self.analysis.reader
        for made in self.analysis.regions.regions[region].incoming:
            is_plain = reader.forms[made.node].is_product
            if not (made.is_product and is_plain) or made.node in reader.stops:
                continue
            scalar, transposed, core = normalise(made.polynomial)
            if not scalar.is_one or _reads_identity(reader, made.node):
                continue  # the latter would drag a product with the identity matrix along
            step = made.step.making(made.polynomial)
            laid = Laid(made.node, transposed)
            self.existing.setdefault((Value(core, made.backward), step), laid)

    # -- questions -----------------------------------------------------------------------------

    def value(self, core: Polynomial, backward: bool) -> Value:
        """The value of a normalised polynomial, in the phase in which it is computed."""
        matrices, gradients = self.analysis.reader.leaves.matrices, self.analysis.phases.gradients
        nodes = (node for i in core.leaves for node in matrices[i].sources)
        return Value(core, backward or any(node in gradients for node in nodes))

    def is_alike(self, one: Value, other: Value) -> bool:
        """True if two values are made by the same step, which runs in the same way."""
        steps, names = self.steps, self.implementations
        return steps.get(one) == steps.get(other) and names.get(one) == names.get(other)

    def came(self, value: Value, step: Step) -> bool:
        """True if the incoming graph takes a step, and runs it as the plan does."""
        return self.runs_as_usual(value) and (value, step) in self._incoming

    def runs_as_usual(self, value: Value) -> bool:
        """True if a step runs as in a graph that takes it."""
        return named(self.implementations[value]).is_usual

    def came_so(self, value: Value, step: Step) -> bool:
        """True if the incoming graph makes all that a step reads as the plan does.

        Otherwise the node that takes the step there would drag along another way to its operands.
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


def task_of(analysis: Analysis, plans: Mapping[int, Plan]) -> Task:
    """The task of putting plans into a graph.

    Args:
        analysis: The graph as it came.
        plans: By the index of a region, what to compute it by; the others stay as they came.
    """
    return Task(analysis, plans)


@lru_cache(maxsize=4096)
def _as_it_came(problem: Problem) -> Plan:
    """The first step of the incoming graph towards every value."""
    first: dict[Value, Step] = {}
    for value, step in problem.incoming:
        first.setdefault(value, step)
    return accumulated(problem, Plan(first)).laid(problem)


@lru_cache(maxsize=4096)
def _all_steps(problem: Problem) -> tuple[tuple[Value, Step], ...]:
    """Every step of the incoming graph; sums also as they accumulate."""
    steps = (*problem.incoming, *_as_it_came(problem).steps.items())
    return tuple(dict.fromkeys(steps))


def _reads_identity(reader: GraphReader, node: fx.Node) -> bool:
    """True if a product takes, or is, a product with the identity matrix."""
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
