"""Varying problems: the plans of a problem and their prices, for all sizes of one dimension.

Before -> after: a LoRA layer with N tokens -> the plans that are cheapest for some N, their prices
at any N, and the sizes at which another plan becomes the choice.

Invariant: the choice at a size is the decision that
:func:`~runlora_fx.passes.search.decide.decide` would make there among these plans, by the same rule
for ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import pairwise

from runlora_fx.cost_model.objective import Objective
from runlora_fx.passes.algebra.plan import Plan, incoming_operations
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.search.decide import Priced, replaces
from runlora_fx.passes.search.frontiers import effort_limit, search

#: Sizes at which plans are searched, the most telling ones first, and sizes at which they are
#: compared [elements].
SEARCHED = (1024, 16, 32768, 256, 64, 4096, 1)
COMPARED = tuple(dict.fromkeys(round(2 ** (k / 2)) for k in range(35)))

#: The widths of the search at each of these sizes. Few problems need more.
_WIDTHS = (16, 128)


@dataclass(frozen=True)
class Varying:
    """A problem in which some dimensions have one size that varies between calls.

    Attributes:
        problem: The problem, with size 1 in these dimensions.
        dims: The indices of the dimensions.
        objective: The objective that ranks its plans.
    """

    problem: Problem
    dims: frozenset[int]
    objective: Objective

    @classmethod
    def of(cls, problem: Problem, dims: frozenset[int], objective: Objective) -> Varying:
        """The problem with one size left open.

        Times are computed from the rates of the machine. Measured times of single products are
        left out: they exist for few sizes, and prices would jump between sizes.
        """
        smooth = replace(objective, profile=replace(objective.profile, measured=()))
        return cls(_sized(problem, dims, 1), dims, smooth)

    def at(self, size: int) -> Problem:
        """The problem at a size."""
        return _sized(self.problem, self.dims, size)

    def priced(self, plan: Plan | None, size: int) -> Priced:
        """The price and the cost of a plan at a size; of the incoming graph if it is None."""
        return self.all_priced([plan], size)[0]

    def all_priced(self, plans: Sequence[Plan | None], size: int) -> tuple[Priced, ...]:
        """The same of several plans. They share one problem, and so the layouts of its values."""
        problem = self.at(size)
        return tuple(
            Priced.of(
                incoming_operations(problem) if plan is None else plan.operations(problem),
                self.objective,
            )
            for plan in plans
        )


@dataclass
class PricedPlans:
    """The plans of a varying problem and their prices, computed once for every size.

    Attributes:
        varying: The problem.
        plans: None for the incoming graph, then every plan that is cheapest at some size.
    """

    varying: Varying
    plans: tuple[Plan | None, ...]
    _known: dict[int, tuple[Priced, ...]] = field(default_factory=dict)

    def at(self, size: int) -> tuple[Priced, ...]:
        """The price and the cost of every plan at a size."""
        if size not in self._known:
            self._known[size] = self.varying.all_priced(self.plans, size)
        return self._known[size]

    def is_dearer(self, plan: int, size: int) -> bool:
        """True if a plan costs more than the incoming graph at a size."""
        priced = self.at(size)
        return self.varying.objective.is_less(priced[0].price, priced[plan].price)

    def is_worth(self, plan: int, size: int) -> bool:
        """True if a plan would replace the incoming graph if this were the only size."""
        priced = self.at(size)
        return replaces(self.varying.objective, priced[0], priced[plan])

    def choice(self, size: int) -> int:
        """The index of the plan that would be chosen if this were the only size."""
        priced = self.at(size)
        best = min(range(len(priced)), key=lambda i: priced[i].price)
        return best if self.is_worth(best, size) else 0

    def borders(self) -> Iterator[int]:
        """The sizes at which the choice changes, or a plan starts or stops being worth it.

        A plan that ties with the incoming graph is not worth it.
        """
        yield from _flips(self.choice)
        for plan in range(1, len(self.plans)):
            yield from _flips(partial(self.is_worth, plan))

    def critical(self) -> Iterator[int]:
        """The sizes at which a plan starts or stops being dearer than the incoming graph."""
        for plan in range(1, len(self.plans)):
            yield from _flips(partial(self.is_dearer, plan))


@lru_cache(maxsize=1024)
def candidates(varying: Varying) -> PricedPlans:
    """The incoming graph, and every plan that is cheapest at some searched size.

    All searches together may take about as much work as a decision for one size. Beyond that, the
    less telling sizes are left out.
    """
    found: dict[frozenset[object], Plan | None] = {frozenset(): None}
    left = effort_limit(varying.problem)
    for size in SEARCHED:
        if left <= 0:
            break
        searched = search(varying.at(size), varying.objective, widths=_WIDTHS)
        left -= searched.effort
        found.setdefault(searched.plan.signature, searched.plan)
    return PricedPlans(varying, tuple(found.values()))


def first_size(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The least size in (low, high] for which a condition holds; from there on it always holds."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _flips(of: Callable[[int], object]) -> Iterator[int]:
    """The sizes at which a function of the size changes its value."""
    at = [of(size) for size in COMPARED]
    for (low, high), (before, now) in zip(pairwise(COMPARED), pairwise(at), strict=True):
        if before != now:
            yield first_size(lambda size, now=now: of(size) == now, low, high)  # type: ignore[misc]


def _sized(problem: Problem, dims: frozenset[int], size: int) -> Problem:
    return replace(
        problem, dims=tuple(size if i in dims else own for i, own in enumerate(problem.dims))
    )
