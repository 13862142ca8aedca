"""Tasks: what is to be emitted, as data, before anything is written.

    plans of two regions      ->      one plan for the graph, the roots that they touch,
                                      and the nodes that already compute a step of it

Invariant: a task never changes, and says nothing of what the emitted nodes look like.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
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
from runlora_fx.passes.read.regions import Root


class Laid(NamedTuple):
    """A node that holds a value, or the transpose of it."""

    node: fx.Node
    transposed: bool


@dataclass(frozen=True)
class Task:
    """What is to be emitted into one graph.

    Attributes:
        analysis: The graph as it came.
        steps: A step for every value that the roots need, in leaves of the graph.
        implementations: What runs each step, by name.
        lies: By value that has a step, whether it is computed transposed.
        roots: All roots that are emitted, in graph order.
        existing: Nodes of the incoming graph that compute a value by a step.
        incoming: Every step of the incoming graph.
    """

    analysis: Analysis
    steps: Mapping[Value, Step]
    implementations: Mapping[Value, str]
    lies: Mapping[Polynomial, bool]
    roots: tuple[Root, ...]
    existing: Mapping[tuple[Value, Step], Laid]
    incoming: frozenset[tuple[Value, Step]]

    def value(self, core: Polynomial, backward: bool) -> Value:
        """The value of a normalised polynomial, in the phase in which it is computed."""
        matrices, gradients = self.analysis.reader.leaves.matrices, self.analysis.phases.gradients
        nodes = (node for i in core.leaves for node in matrices[i].sources)
        return Value(core, backward or any(node in gradients for node in nodes))

    @cached_property
    def uses(self) -> Counter[Value]:
        """How often each value is read, by steps of either phase and by roots."""
        uses: Counter[Value] = Counter()
        for root in self.roots:
            uses.update(self.value(normalise(p).core, root.backward) for p in root.parts)
        for value, step in self.steps.items():
            if isinstance(step, Keep):
                uses[Value(value.core, False)] += 1
            else:
                operands = (normalise(p).core for p in step.operands)
                uses.update(self.value(core, value.backward) for core in operands)
        return uses

    def is_alike(self, one: Value, other: Value) -> bool:
        """Whether two values are made by the same step, which runs in the same way."""
        steps, names = self.steps, self.implementations
        return steps.get(one) == steps.get(other) and names.get(one) == names.get(other)

    def came(self, value: Value, step: Step) -> bool:
        """Whether the incoming graph takes a step, and runs it as the plan does."""
        return self.runs_as_usual(value) and (value, step) in self.incoming

    def runs_as_usual(self, value: Value) -> bool:
        """Whether a step runs as in a graph that takes it."""
        return named(self.implementations[value]).is_usual

    def came_so(self, value: Value, step: Step) -> bool:
        """Whether the incoming graph makes all that a step reads as the plan does.

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
    regions, plan = analysis.regions, _whole_plan(analysis, plans)
    touched = {root.node for i in plans for root, _ in regions.regions[i].demands}
    return Task(
        analysis,
        plan.steps,
        plan.implementations,
        plan.lies or {},
        tuple(root for root in regions.roots if root.node in touched),
        _existing(analysis),
        frozenset(_incoming(analysis)),
    )


def _whole_plan(analysis: Analysis, plans: Mapping[int, Plan]) -> Plan:
    """One plan for the graph: the chosen steps where it changes, the incoming ones elsewhere."""
    steps: dict[Value, Step] = {}
    implementations: dict[Value, str] = {}
    lies: dict[Polynomial, bool] = {}
    for i, posed in enumerate(analysis.posed):
        whole = posed.in_graph(plans.get(i) or _as_it_came(posed.problem))
        steps.update(whole.steps)
        implementations.update(whole.implementations)
        lies.update(whole.lies or {})
    return Plan(steps, implementations, lies)


@lru_cache(maxsize=4096)
def _as_it_came(problem: Problem) -> Plan:
    """The first step of the incoming graph towards every value."""
    first: dict[Value, Step] = {}
    for value, step in problem.incoming:
        first.setdefault(value, step)
    return accumulated(problem, Plan(first)).laid(problem)


def _incoming(analysis: Analysis) -> set[tuple[Value, Step]]:
    """Every step of the graph as it came, in its own leaves; sums also as they accumulate."""
    return {
        posed.step_in_graph(value, step)
        for posed in analysis.posed
        for value, step in _all_steps(posed.problem)
    }


@lru_cache(maxsize=4096)
def _all_steps(problem: Problem) -> tuple[tuple[Value, Step], ...]:
    steps = (*problem.incoming, *_as_it_came(problem).steps.items())
    return tuple(dict.fromkeys(steps))


def _existing(analysis: Analysis) -> dict[tuple[Value, Step], Laid]:
    """Interior nodes that are products: a plan that makes the same product can take them."""
    found: dict[tuple[Value, Step], Laid] = {}
    reader = analysis.reader
    for region in analysis.regions.regions:
        for made in region.incoming:
            is_plain = reader.forms[made.node].is_product
            if not (made.is_product and is_plain) or made.node in reader.stops:
                continue
            if _reads_identity(reader, made.node):
                continue  # it would drag a product with the identity matrix along
            scalar, transposed, core = normalise(made.polynomial)
            if scalar.is_one:
                step = made.step.making(made.polynomial)
                found.setdefault((Value(core, made.backward), step), Laid(made.node, transposed))
    return found


def _reads_identity(reader: GraphReader, node: fx.Node) -> bool:
    """Whether a product takes, or is, a product with the identity matrix."""
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
