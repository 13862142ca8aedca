"""Varying problems: what the plans of a problem cost, whatever size one of its dimensions has.

Before -> after: a LoRA layer with N tokens -> the plans that are the cheapest for some N, what each
of them costs at any N, and the sizes at which another one becomes the choice.

Invariant: the choice at a size is what :func:`~runlora_fx.passes.search.decide.decide` would do at
that size with these plans: the same rule says what is a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import pairwise

from runlora_fx.cost_model.objective import Objective
from runlora_fx.passes.algebra.plan import Plan, incoming_operations, total_cost
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.search.decide import Priced, replaces
from runlora_fx.passes.search.frontiers import search

#: Sizes at which plans are searched, and sizes at which they are compared [elements].
SEARCHED = (1, 16, 64, 256, 1024, 4096, 32768)
COMPARED = tuple(dict.fromkeys(round(2 ** (k / 2)) for k in range(35)))

#: How wide plans are searched at each of these sizes; only a few problems need more.
_WIDTHS = (16, 128)


@dataclass(frozen=True)
class Varying:
    """A problem of which some dimensions are one and the same size, not known beforehand.

    Attributes:
        problem: The problem, with a size of 1 in these dimensions.
        dims: Indices of the dimensions.
        objective: How its plans are ranked.
    """

    problem: Problem
    dims: frozenset[int]
    objective: Objective

    @classmethod
    def of(cls, problem: Problem, dims: frozenset[int], objective: Objective) -> Varying:
        """The problem, whatever size it has in some dimensions.

        Times are those that the rates of the machine give: measurements of single products make
        them jump from size to size, and ranges are for sizes that nobody measured.
        """
        smooth = replace(objective, profile=replace(objective.profile, measured=()))
        return cls(_sized(problem, dims, 1), dims, smooth)

    def at(self, size: int) -> Problem:
        """The problem at a size."""
        return _sized(self.problem, self.dims, size)

    def priced(self, plan: Plan | None, size: int) -> Priced:
        """The price and the cost of a plan, or of the graph as it came, at a size."""
        problem = self.at(size)
        operations = incoming_operations(problem) if plan is None else plan.operations(problem)
        return Priced(self.objective.total(operations), total_cost(operations))


@dataclass
class PricedPlans:
    """The plans of a varying problem and what they cost; a size is priced once.

    Attributes:
        varying: The problem.
        plans: The graph as it came (None), then every plan that is the cheapest at some size.
    """

    varying: Varying
    plans: tuple[Plan | None, ...]
    _known: dict[int, tuple[Priced, ...]] = field(default_factory=dict)

    def at(self, size: int) -> tuple[Priced, ...]:
        """What each plan costs at a size."""
        if size not in self._known:
            self._known[size] = tuple(self.varying.priced(plan, size) for plan in self.plans)
        return self._known[size]

    def is_dearer(self, plan: int, size: int) -> bool:
        """True if a plan costs more than the graph as it came."""
        priced = self.at(size)
        return self.varying.objective.is_less(priced[0].price, priced[plan].price)

    def is_worth(self, plan: int, size: int) -> bool:
        """True if a plan would replace the graph as it came if a size were the only one."""
        priced = self.at(size)
        return replaces(self.varying.objective, priced[0], priced[plan])

    def choice(self, size: int) -> int:
        """The plan that would be taken if a size were the only one."""
        priced = self.at(size)
        best = min(range(len(priced)), key=lambda i: priced[i].price)
        return best if self.is_worth(best, size) else 0

    def borders(self) -> Iterator[int]:
        """The sizes at which another plan is the choice, or a plan begins or ceases to be worth it.

        At a size where a plan ties with the graph as it came it is not worth it.
        """
        yield from _flips(self.choice)
        for plan in range(1, len(self.plans)):
            yield from _flips(partial(self.is_worth, plan))

    def critical(self) -> Iterator[int]:
        """The sizes at which a plan begins or ceases to be dearer than the graph as it came."""
        for plan in range(1, len(self.plans)):
            yield from _flips(partial(self.is_dearer, plan))


@lru_cache(maxsize=1024)
def candidates(varying: Varying) -> PricedPlans:
    """The graph as it came and every plan that is the cheapest at some size that is searched."""
    found: dict[frozenset[object], Plan | None] = {frozenset(): None}
    for size in SEARCHED:
        plan = search(varying.at(size), varying.objective, widths=_WIDTHS).plan
        found.setdefault(plan.signature, plan)
    return PricedPlans(varying, tuple(found.values()))


def first_size(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The least size in (low, high] for which something holds that holds from there on."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _flips(of: Callable[[int], object]) -> Iterator[int]:
    """The sizes at which something is not what it was at the size before."""
    at = [of(size) for size in COMPARED]
    for (low, high), (before, now) in zip(pairwise(COMPARED), pairwise(at), strict=True):
        if before != now:
            yield first_size(lambda size, now=now: of(size) == now, low, high)  # type: ignore[misc]


def _sized(problem: Problem, dims: frozenset[int], size: int) -> Problem:
    return replace(
        problem, dims=tuple(size if i in dims else own for i, own in enumerate(problem.dims))
    )
