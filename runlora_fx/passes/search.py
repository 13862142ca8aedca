"""The search: the cheapest plan for all demands of a problem together, exactly.

Values and the ways to make them form an AND-OR graph without cycles: every operand is smaller than
what it makes. A shared value is paid once, so the price is that of a DAG, not of trees. The search
is A* over *frontiers*, the sets of values still to be made: it takes the largest value of a
frontier (nothing left can need it again), pays for one way to make it, and puts its operands in its
place. The cheapest way to make a value, summed over the frontier, never overestimates what is left
to pay, so the first empty frontier is a cheapest plan.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, count

from runlora_fx.cost_model.objective import Objective, Price
from runlora_fx.cost_model.ops import GemmShape, MatMul
from runlora_fx.passes.algebra import (
    Polynomial,
    Word,
    components,
    factorisations,
    normalise,
)
from runlora_fx.passes.plan import (
    Keep,
    Plan,
    Problem,
    Product,
    Step,
    Sum,
    Value,
    incoming_operations,
    is_broadcast,
    step_operation,
)

#: Up to this many words every way to split a sum in two is tried; beyond, common factors only.
_ALL_SPLITS = 6

#: Values in the frontiers that are looked at before the search gives up, after some ten seconds.
#: Real models need some thousands; counted, for a plan must not depend on the machine's load.
_EFFORT = 2_000_000

#: From this element width on, reassociation is as exact as what it replaces [B].
_EXACT_ITEMSIZE = 4

#: Values to visit in search of products to measure.
_VALUES = 5_000


class SearchLimitError(RuntimeError):
    """The search gave up: the problem has too many plans."""


def cheapest(
    problem: Problem, objective: Objective, first: Step | None = None, share: float = 1.0
) -> Plan:
    """The plan with the least price among all ways that :class:`Ways` knows.

    Args:
        problem: What to compute.
        objective: How steps are priced.
        first: If given, the step that the first demand has to take: a question of the form
            "what if the weight were merged?".
        share: Of the effort after which the search gives up, what may be spent.

    Raises:
        SearchLimitError: If more than a fixed effort was spent.
        ValueError: If no plan exists.
    """
    ways = Ways(problem, objective)
    forced = {problem.demands[0]: [first]} if first is not None else {}
    start = frozenset(d for d in problem.demands if not ways.is_given(d))
    tie = count()
    queue: list[tuple[Price, int, Price, frozenset[Value], _Path | None]] = [
        (0, next(tie), 0, start, None)
    ]
    best: dict[frozenset[Value], Price] = {start: 0}
    effort = 0
    while queue:
        _, _, paid, frontier, path = heapq.heappop(queue)
        if not frontier:
            return Plan(_flattened(problem, ways, dict(path.walk()) if path else {}))
        if paid > best[frontier]:
            continue
        value = max(frontier, key=ways.rank)
        rest = frontier - {value}
        for step, price, operands in ways.of(value):
            if value in forced and step not in forced[value]:
                continue
            state, total = rest | operands, paid + price
            effort += len(state)
            if effort > _EFFORT * share:
                raise SearchLimitError("the search gave up: the problem has too many plans")
            bound = ways.bound(state)
            if bound is not None and total < best.get(state, total + 1):
                best[state] = total
                path_here = _Path(value, step, path)
                heapq.heappush(queue, (total + bound, next(tie), total, state, path_here))
    raise ValueError(f"no plan for {problem.demands}")


def candidate_products(problem: Problem, objective: Objective) -> list[GemmShape]:
    """The products of all plans that can be cheaper than the graph as it came.

    One that is predicted to cost twice as much as all of that graph need not be measured.
    """
    ways = Ways(problem, objective)
    limit = 2 * objective.total(incoming_operations(problem))
    found: dict[GemmShape, None] = {}
    pending, seen = list(problem.demands), set(problem.demands)
    while pending and len(seen) < _VALUES:
        value = pending.pop()
        for step, price, operands in ways.of(value):
            if price > limit:
                continue
            operation = step_operation(problem, value.core, step)
            if isinstance(operation, MatMul):
                found[operation.shape] = None
            pending.extend(operands - seen)
            seen |= operands
    return list(found)


def _flattened(problem: Problem, ways: Ways, steps: Mapping[Value, Step]) -> dict[Value, Step]:
    """The same steps, with sums that only one sum reads added up there: it costs the same."""
    uses = Counter(v for value, step in steps.items() for v in ways.operands(value, step))

    def parts(value: Value, step: Sum) -> Iterator[Polynomial]:
        for part in step.parts:
            scalar, transposed, core = normalise(part)
            below = ways.phase(core, value.backward)
            inner = steps.get(below)
            if isinstance(inner, Sum) and uses[below] == 1 and below not in problem.demands:
                absorbed.add(below)
                yield from ((p.T if transposed else p).scaled(scalar) for p in parts(below, inner))
            else:
                yield part

    absorbed: set[Value] = set()
    flat = {v: Sum(tuple(parts(v, s))) if isinstance(s, Sum) else s for v, s in steps.items()}
    return {value: step for value, step in flat.items() if value not in absorbed}


@dataclass(frozen=True)
class _Path:
    """The decisions that led to a frontier, latest first."""

    value: Value
    step: Step
    before: _Path | None

    def walk(self) -> Iterator[tuple[Value, Step]]:
        node: _Path | None = self
        while node is not None:
            yield node.value, node.step
            node = node.before


Terms = tuple[tuple[Word, float], ...]
Way = tuple[Step, Price, frozenset[Value]]


@dataclass
class Ways:
    """The AND-OR graph of a problem, made as it is visited."""

    problem: Problem
    objective: Objective
    _known: dict[Value, list[Way]] = field(default_factory=dict)
    _least: dict[Value, Price] = field(default_factory=dict)
    _incoming: Mapping[Value, list[Step]] = field(init=False)
    _materialised: set[Polynomial] = field(init=False)

    def __post_init__(self) -> None:
        incoming: dict[Value, list[Step]] = {}
        for value, step in self.problem.incoming:
            incoming.setdefault(value, []).append(step)
        self._incoming = incoming
        self._materialised = {value.core for value in (*incoming, *self.problem.demands)}

    def rank(self, value: Value) -> tuple[int, bool, Terms]:
        """Orders values such that operands come before what they make."""
        return (value.core.size, value.backward, value.core.terms)

    def is_given(self, value: Value) -> bool:
        """Whether the value is a diagonal matrix, or a leaf that needs no step."""
        if value.core.is_diagonal:  # a vector, or the identity
            return True
        factor = value.core.leaf
        return factor is not None and (not value.backward or self.problem.leaves[factor.leaf].held)

    def bound(self, frontier: frozenset[Value]) -> Price | None:
        """A lower bound of the price of what a frontier still needs; None if it cannot be met."""
        total: Price = 0
        for value in frontier:
            if not self.of(value):
                return None
            total += self.least(value)
        return total

    def least(self, value: Value) -> Price:
        """The price of the cheapest step that makes a value."""
        if value not in self._least:
            self._least[value] = min((price for _, price, _ in self.of(value)), default=0)
        return self._least[value]

    def of(self, value: Value) -> list[Way]:
        """All ways to make a value: (step, its price, the operands that need a step)."""
        if value not in self._known:
            self._known[value] = [
                (step, self._price(value, step), operands)
                for step in dict.fromkeys(self._steps(value))
                for operands in [self.operands(value, step)]
                if self._rounds_as_before(operands)
                # The incoming graph may add a value to itself: X A + X A.
                if all(self.rank(operand) < self.rank(value) for operand in operands)
            ]
        return self._known[value]

    def _rounds_as_before(self, operands: frozenset[Value]) -> bool:
        """Whether a step reads nothing that is rounded here and was not in the incoming graph."""
        if self.objective.adds_rounding or self.problem.itemsize >= _EXACT_ITEMSIZE:
            return True
        return all(v.core.leaf is not None or v.core in self._materialised for v in operands)

    def _price(self, value: Value, step: Step) -> Price:
        operation = step_operation(self.problem, value.core, step)
        return 0 if operation is None else self.objective.price(operation)

    def phase(self, p: Polynomial, backward: bool) -> Value:
        """The value behind an operand of a step that runs in the given phase."""
        core = normalise(p).core
        tangent = any(self.problem.leaves[i].backward for i in core.leaves)
        return Value(core, backward or tangent)

    def operands(self, value: Value, step: Step) -> frozenset[Value]:
        """The values that a step reads, without those that need no step of their own."""
        if isinstance(step, Keep):
            return frozenset([Value(value.core, False)])
        polynomials = step.parts if isinstance(step, Sum) else (step.left, step.right)
        operands = (self.phase(p, value.backward) for p in polynomials)
        return frozenset(v for v in operands if not self.is_given(v))

    def _steps(self, value: Value) -> Iterator[Step]:
        core = value.core
        if core.leaf is not None:
            return  # a forward leaf that the backward does not hold
        yield from self._incoming.get(value, ())
        # What lasts from call to call need not be kept besides.
        lasts = core.leaves <= self.problem.lasting
        if value.backward and core in self.problem.kept and not lasts:
            yield Keep()
        for left, right in factorisations(core):
            # A diagonal matrix is a vector that exists; none is made.
            if any(p.is_diagonal and p.leaf is None for p in (left, right)):
                continue
            # Biases are broadcast one by one, as the reader adds them: nothing is gained otherwise.
            if len(core) == 1 or not is_broadcast(self.problem.leaves, left, right):
                yield Product(left, right)
        if len(core) == 1:
            return
        if len(core) <= _ALL_SPLITS:
            yield from _all_splits(core)
        elif len(parts := components(core)) > 1:
            yield Sum(tuple(parts))
        else:
            yield from _factor_splits(core)


def _all_splits(core: Polynomial) -> Iterator[Step]:
    """Every way to split the words in two."""
    first, *others = core.terms
    for k in range(len(others)):
        for chosen in combinations(others, k):
            rest = tuple(t for t in others if t not in chosen)
            yield Sum((Polynomial((first, *chosen)), Polynomial(rest)))


def _factor_splits(core: Polynomial) -> Iterator[Step]:
    """Apart what shares a first or last factor; and every word alone."""
    for end in (0, -1):
        for factor in dict.fromkeys(word.factors[end] for word in core.words):
            chosen = tuple(t for t in core.terms if t[0].factors[end] == factor)
            if 1 < len(chosen) < len(core):
                rest = tuple(t for t in core.terms if t not in chosen)
                yield Sum((Polynomial(chosen), Polynomial(rest)))
    yield Sum(tuple(Polynomial((term,)) for term in core.terms))
