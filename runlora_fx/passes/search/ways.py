"""The ways to make a value: every step that computes it, its price, and what it reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations

from runlora_fx.cost_model.objective import Objective, Price
from runlora_fx.passes.algebra.factorise import components, factorisations
from runlora_fx.passes.algebra.implementations import Implementation, Work, operation_of, serving
from runlora_fx.passes.algebra.polynomials import Polynomial, Word, normalise
from runlora_fx.passes.algebra.problem import Problem, Value, is_broadcast
from runlora_fx.passes.algebra.steps import Keep, Product, Step, Sum
from runlora_fx.passes.search.assigned import assigned_steps, is_assigned

#: Up to this many words every way to split a sum in two is tried; beyond, common factors only.
_ALL_SPLITS = 6

#: From this element width on, reassociation is as exact as what it replaces [B].
_EXACT_ITEMSIZE = 4

Terms = tuple[tuple[Word, float], ...]
Way = tuple[Step, Price, frozenset[Value]]


@dataclass
class Ways:
    """The AND-OR graph of a problem, made as it is visited."""

    problem: Problem
    objective: Objective
    _known: dict[Value, list[Way]] = field(default_factory=dict)
    _incoming: Mapping[Value, list[Step]] = field(init=False)
    _materialised: set[Polynomial] = field(init=False)

    def __post_init__(self) -> None:
        incoming: dict[Value, list[Step]] = {}
        for value, step in self.problem.incoming:
            incoming.setdefault(value, []).append(step)
        self._incoming = incoming
        self._materialised = {value.core for value in (*incoming, *self.problem.demands)}

    def rank(self, value: Value) -> tuple[int, int, bool, Terms]:
        """Orders values such that operands come before what they make.

        What is picked or scattered has as many factors as what it is made from.
        """
        core, leaves = value.core, self.problem.leaves
        marks = 0
        if self.problem.assignments:
            marks = sum(leaves[leaf].picked is not None for leaf in core.leaves)
            marks += sum(bool(word.scattered) for word in core.words)
        return (core.size, marks, value.backward, core.terms)

    def is_given(self, value: Value) -> bool:
        """Whether the value is a diagonal matrix, or a leaf that needs no step."""
        if value.core.is_diagonal:  # a vector, or the identity
            return True
        factor = value.core.leaf
        if factor is None or self.problem.leaves[factor.leaf].picked is not None:
            return False
        return not value.backward or self.problem.leaves[factor.leaf].held

    def of(self, value: Value) -> list[Way]:
        """All ways to make a value: (step, its price, the operands that need a step)."""
        if value not in self._known:
            self._known[value] = self._possible(value, self._steps(value))
        return self._known[value]

    def taken(self, value: Value) -> Collection[Step]:
        """The steps that the incoming graph takes towards a value."""
        return self._incoming.get(value, ())

    def simple(self, value: Value) -> list[Way]:
        """A few ways: sums are split as long ones are, along common factors and into words."""
        return self._possible(value, [*self._steps(value, all_splits=2)])

    def _possible(self, value: Value, steps: Iterable[Step]) -> list[Way]:
        """Those steps that may be taken towards a value, with prices and operands."""
        return [
            (step, self._price(value, step), operands)
            for step in dict.fromkeys(steps)
            for operands in [self.operands(value, step)]
            if self._rounds_as_before(operands)
            if not _adds_vector(value, step)
            # The incoming graph may add a value to itself: X A + X A.
            if all(self.rank(operand) < self.rank(value) for operand in operands)
        ]

    def _rounds_as_before(self, operands: frozenset[Value]) -> bool:
        """Whether a step reads nothing that is rounded here and was not in the incoming graph."""
        # What experts multiply by is as the model makes it, whatever the width.
        is_exact = self.problem.itemsize >= _EXACT_ITEMSIZE and not self.problem.assignments
        if self.objective.adds_rounding or is_exact:
            return True
        return all(v.core.leaf is not None or v.core in self._materialised for v in operands)

    def implementation(self, value: Value, step: Step) -> Implementation:
        """The cheapest implementation of a step; of those that tie, the one a graph runs."""
        return min(self.implementations(value, step), key=lambda one: one[1])[0]

    def implementations(self, value: Value, step: Step) -> list[tuple[Implementation, Price]]:
        """All implementations of a step, with their prices; the one a graph runs comes first."""
        work = Work(self.problem, value.core, step, self.problem.dims)
        return [
            (one, 0 if operation is None else self.objective.price(operation))
            for one in serving(work)
            for operation in [operation_of(one, work)]
        ]

    def _price(self, value: Value, step: Step) -> Price:
        return min(price for _, price in self.implementations(value, step))

    def phase(self, p: Polynomial, backward: bool) -> Value:
        """The value behind an operand of a step that runs in the given phase."""
        core = normalise(p).core
        needs_gradient = any(self.problem.leaves[i].backward for i in core.leaves)
        return Value(core, backward or needs_gradient)

    def operands(self, value: Value, step: Step) -> frozenset[Value]:
        """The values that a step reads, without those that need no step of their own."""
        if isinstance(step, Keep):
            return frozenset([Value(value.core, False)])
        operands = (self.phase(p, value.backward) for p in step.operands)
        return frozenset(v for v in operands if not self.is_given(v))

    def _steps(self, value: Value, all_splits: int = _ALL_SPLITS) -> Iterator[Step]:
        core = value.core
        is_by_expert = is_assigned(self.problem, core)
        if core.leaf is not None and not is_by_expert:
            return  # a forward leaf that the backward does not hold
        yield from self._incoming.get(value, ())
        # What lasts from call to call need not be kept besides.
        lasts = core.leaves <= self.problem.lasting
        if value.backward and core in self.problem.kept and not lasts:
            yield Keep()
        if is_by_expert:
            yield from assigned_steps(self.problem, core)
        for left, right in () if is_by_expert else factorisations(core):
            # A diagonal matrix is a vector that exists; none is made.
            if any(p.is_diagonal and p.leaf is None for p in (left, right)):
                continue
            # Biases are broadcast one by one, as the reader adds them: nothing is gained otherwise.
            if len(core) == 1 or not is_broadcast(self.problem.leaves, left, right):
                yield Product(left, right)
        if len(core) == 1:
            return
        if len(core) <= all_splits:
            yield from _all_splits(core)
        elif len(parts := components(core)) > 1:
            yield Sum(tuple(parts))
        else:
            yield from _factor_splits(core)


def _adds_vector(value: Value, step: Step) -> bool:
    """True if a step adds the diagonal matrix of a vector to a matrix: the vector is no matrix."""
    return (
        isinstance(step, Sum)
        and not value.core.is_diagonal
        and any(part.is_diagonal and part.leaves for part in step.parts)
    )


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
