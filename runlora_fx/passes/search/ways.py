"""Ways: every step that makes a value, with its implementation, price and operands.

Example: ``X W' + X A' B'`` is a product ``X (W' + A' B')``, or a sum of two products.

Invariant: a way reads only values that come before the value it makes (:meth:`Ways.rank`), so no
value is made from itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple, TypeAlias

from runlora_fx.cost_model.objective import Objective, Price
from runlora_fx.passes.algebra.factorise import components, factorisations
from runlora_fx.passes.algebra.images import is_written
from runlora_fx.passes.algebra.implementations import is_merge, is_mergeable, serving
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.problem import Problem, Value, is_broadcast
from runlora_fx.passes.algebra.steps import Accumulate, Keep, Product, Step, Sum, Unpack
from runlora_fx.passes.algebra.words import Word
from runlora_fx.passes.algebra.work import Work
from runlora_fx.passes.search.assigned import assigned_steps, is_assigned

#: The largest sum that is split in two in every way [words]. Longer ones are split by common
#: factors.
_ALL_SPLITS = 6

#: The same if only a few ways are listed.
_FEW_SPLITS = 2

#: The element width from which on ``numerics="strict"`` allows any order of products [B].
_EXACT_ITEMSIZE = 4

Terms = tuple[tuple[Word, float], ...]


class Way(NamedTuple):
    """One way to make a value: a step, and its implementation.

    Attributes:
        step: The step.
        implementation: The name of the implementation.
        price: The price of both.
        reads: The values that it reads and that need a step.
    """

    step: Step
    implementation: str
    price: Price
    reads: frozenset[Value]


class _Listed(NamedTuple):
    """One step towards a value, as far as it is independent of sizes and prices.

    Attributes:
        step: The step.
        reads: The values behind all its operands that need a step.
        is_ordered: True if these values rank below the value that it makes.
    """

    step: Step
    reads: frozenset[Value]
    is_ordered: bool


#: By value, and the most words of a sum that is split in every way: the steps towards the value.
_Listing: TypeAlias = dict[tuple[Value, int], tuple[_Listed, ...]]


@lru_cache(maxsize=64)
def _listing(sizeless: Problem) -> _Listing:
    """The steps that are known of a problem, for all its sizes; empty to begin with."""
    return {}


@dataclass
class Ways:
    """The ways to make every value of a problem, listed on demand.

    Values and ways form an AND-OR graph: a value needs one of its ways, a way needs all values that
    it reads. Problems that differ only in sizes share the steps, but not the prices.
    """

    problem: Problem
    objective: Objective
    _known: dict[Value, list[Way]] = field(default_factory=dict)
    _listed: _Listing = field(init=False)
    _incoming: Mapping[Value, list[Step]] = field(init=False)
    _materialised: set[Polynomial] = field(init=False)

    def __post_init__(self) -> None:
        incoming: dict[Value, list[Step]] = {}
        for value, step in self.problem.incoming:
            incoming.setdefault(value, []).append(step)
        self._incoming = incoming
        # Which operators serve experts depends on the sizes, so their steps do as well.
        is_sized = bool(self.problem.assignments)
        self._listed = {} if is_sized else _listing(replace(self.problem, dims=()))
        self._materialised = {value.core for value in (*incoming, *self.problem.demands)}

    def rank(self, value: Value) -> tuple[int, int, bool, Terms]:
        """A sort key that ranks operands below the values that are made from them.

        The size alone does not: a picked or scattered value has as many factors as its operand.
        """
        core, leaves = value.core, self.problem.leaves
        marks = 0
        if self.problem.assignments:
            marks = sum(leaves[leaf].picked is not None for leaf in core.leaves)
            marks += sum(bool(word.scattered) for word in core.words)
        return (core.size, marks, value.backward, core.terms)

    def is_given(self, value: Value) -> bool:
        """True if a value needs no step: a diagonal matrix, or a leaf whose tensor exists."""
        if value.core.is_diagonal:  # a vector, or the identity
            return True
        factor = value.core.leaf
        if factor is None:
            return False
        leaf = self.problem.leaves[factor.leaf]
        if leaf.picked is not None or leaf.packed:
            return False
        return not value.backward or leaf.held

    def of(self, value: Value) -> list[Way]:
        """All ways to make a value."""
        if value not in self._known:
            self._known[value] = self._possible(value, _ALL_SPLITS)
        return self._known[value]

    def taken(self, value: Value) -> Collection[Step]:
        """The steps that the incoming graph takes towards a value."""
        return self._incoming.get(value, ())

    def simple(self, value: Value) -> list[Way]:
        """Some of the ways: sums are split by common factors and into words only."""
        return self._possible(value, _FEW_SPLITS)

    def simple_steps(self, value: Value) -> Collection[Step]:
        """The steps of these ways, and steps that no implementation runs."""
        return {listed.step for listed in self._towards(value, _FEW_SPLITS)}

    def _towards(self, value: Value, all_splits: int) -> tuple[_Listed, ...]:
        """The steps that may be taken towards a value."""
        found = self._listed.get((value, all_splits))
        if found is None:
            steps = dict.fromkeys(self._steps(value, all_splits))
            found = self._listed[value, all_splits] = tuple(
                [
                    self._found(value, step)
                    for step in steps
                    if not _adds_vector(value, step) and is_written(self.problem.leaves, step)
                ]
            )
        return found

    def _found(self, value: Value, step: Step) -> _Listed:
        """A step with the facts that do not depend on sizes."""
        reads = self._read(value, step, step.operands)
        return _Listed(step, reads, self._comes_after(value, reads))

    def _comes_after(self, value: Value, reads: Iterable[Value]) -> bool:
        """True if a value ranks above others; not so if the incoming graph adds it to itself."""
        rank = self.rank(value)
        return all([self.rank(read) < rank for read in reads])

    def _possible(self, value: Value, all_splits: int) -> list[Way]:
        """The ways by those steps that may be taken towards a value."""
        return [
            way
            for listed in self._towards(value, all_splits)
            for way in self._ways(value, listed)
            if self._rounds_as_before(way.reads)
            and (
                listed.is_ordered
                if way.reads is listed.reads
                else self._comes_after(value, way.reads)
            )
        ]

    def _ways(self, value: Value, listed: _Listed) -> Iterable[Way]:
        """The cheapest implementation of a step for each set of values that one reads."""
        step, reads_all, _ = listed
        work = Work(self.problem, value.core, step, self.problem.dims)
        found: dict[frozenset[Value], Way] = {}
        for one in serving(work):
            operations = one.operations(work)
            if one.needs_times and not self.objective.has_times(operations):
                continue
            if one.spares_picks and not self.objective.prices_picks:
                continue
            price = self.objective.total(operations)
            operands = one.reads(work)
            reads = reads_all if operands == step.operands else self._read(value, step, operands)
            if reads not in found or price < found[reads].price:
                found[reads] = Way(step, one.name, price, reads)
        return found.values()

    def cheapest(self, value: Value, step: Step) -> Way:
        """The cheapest way by a step; of ways that tie, the one that ordinary graphs run."""
        return min(self._ways(value, self._found(value, step)), key=lambda way: way.price)

    def merges(self, value: Value) -> Iterator[Step]:
        """The steps by which one call would make a value, if it is a merged weight."""
        if len(value.core) > 1 and is_merge(self.problem, value.core):
            yield from _accumulations(value.core)

    def _rounds_as_before(self, operands: frozenset[Value]) -> bool:
        """True if no operand of a step is rounded that the incoming graph does not round too."""
        # Experts multiply by weights that the model merged itself, whatever the width.
        is_exact = self.problem.itemsize >= _EXACT_ITEMSIZE and not self.problem.assignments
        if self.objective.adds_rounding or is_exact:
            return True
        return all(v.core.leaf is not None or v.core in self._materialised for v in operands)

    def _read(self, value: Value, step: Step, operands: tuple[Polynomial, ...]) -> frozenset[Value]:
        """The values behind operands, without those that need no step of their own."""
        if isinstance(step, Keep):
            return frozenset([Value(value.core, False)])
        values = (self.problem.value(p, value.backward) for p in operands)
        return frozenset(v for v in values if not self.is_given(v))

    def _steps(self, value: Value, all_splits: int) -> Iterator[Step]:
        core = value.core
        is_by_expert = is_assigned(self.problem, core)
        if core.leaf is not None and not is_by_expert:
            leaf = self.problem.leaves[core.leaf.leaf]
            if leaf.packed and (leaf.held or not value.backward):
                yield Unpack()
            return  # else a forward leaf that the backward does not hold
        yield from self._incoming.get(value, ())
        # A weight that is kept between calls need not be saved for the backward as well.
        lasts = core.leaves <= self.problem.lasting
        if value.backward and core in self.problem.kept and not lasts:
            yield Keep()
        if is_by_expert:
            yield from assigned_steps(self.problem, core)
        for left, right in () if is_by_expert else factorisations(core):
            # No step makes a diagonal matrix, because its vector exists already.
            if any(p.is_diagonal and p.leaf is None for p in (left, right)):
                continue
            # Ones are not factored out of a sum: each bias is broadcast by itself.
            if len(core) == 1 or not is_broadcast(self.problem.leaves, left, right):
                yield Product(left, right)
        if len(core) == 1:
            return
        if is_mergeable(self.problem, core):
            yield from _accumulations(core)
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


def _accumulations(core: Polynomial) -> Iterator[Step]:
    """Every way to add the last product of two leaves: ``(W + s B A) + t D C``."""
    for term in core.terms[1:]:
        for left, right in factorisations(Polynomial((term,))):
            yield Accumulate(left, right, core - Polynomial((term,)))


def _all_splits(core: Polynomial) -> Iterator[Step]:
    """Every way to split the words in two."""
    first, *others = core.terms
    for k in range(len(others)):
        for chosen in combinations(others, k):
            rest = tuple(t for t in others if t not in chosen)
            yield Sum((Polynomial((first, *chosen)), Polynomial(rest)))


def _factor_splits(core: Polynomial) -> Iterator[Step]:
    """Splits into the words that share a first or last factor and the rest; and into all words."""
    for end in (0, -1):
        for factor in dict.fromkeys(word.factors[end] for word in core.words):
            chosen = tuple(t for t in core.terms if t[0].factors[end] == factor)
            if 1 < len(chosen) < len(core):
                rest = tuple(t for t in core.terms if t not in chosen)
                yield Sum((Polynomial(chosen), Polynomial(rest)))
    yield Sum(tuple(Polynomial((term,)) for term in core.terms))
