"""Ranges: the best plans for ranges of one size that varies between calls.

Each plan is best in some range of sizes. A border between ranges costs a guard, and a compilation
for each side. So there are few borders, and they are placed where they save most, over all sizes
and for all problems of the graph together.

Before -> after: two layers, of which one merges from 65 tokens on and the other from 77 -> 1 to 64
tokens with both as they came, 65 to 76 with the first merged, 77 and more with both merged. There
are fewer ranges if these save nearly as much.

Invariant: at no size is a problem dearer than in the incoming graph. Every border is the exact
break-even of some problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import log2

from runlora_fx.cost_model.objective import Price
from runlora_fx.passes.algebra.plan import Plan
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.algebra.steps import Accumulate, Pick, Product, StackProduct, Step
from runlora_fx.passes.search.varying import (
    COMPARED,
    PricedPlans,
    Varying,
    candidates,
    first_size,
)

#: The largest number of ranges; fewer are used if they capture this share of the possible saving.
_MAX_RANGES = 4
_ENOUGH = 0.9


@dataclass(frozen=True)
class Range:
    """Sizes that are served by the same plans.

    Attributes:
        low: The least size.
        high: The size after the largest; None if there is no largest.
        plans: By problem, the plan; None if it stays as it came.
    """

    low: int
    high: int | None
    plans: Mapping[Varying, Plan | None]

    def contains(self, size: int) -> bool:
        """True if a size is in the range."""
        return self.low <= size and (self.high is None or size < self.high)

    def named(self, size: object) -> str:
        """The range as an inequality; empty if it contains all sizes."""
        if self.high is None:
            return f"{size} >= {self.low}" if self.low > 1 else ""
        return f"{self.low} <= {size} < {self.high}" if self.low > 1 else f"{size} < {self.high}"

    def is_best_as_it_came(self, varying: Varying) -> bool:
        """True if at no compared size of the range a plan would replace the incoming graph."""
        known = candidates(varying)
        sizes = filter(self.contains, sorted({self.low, *COMPARED}))
        return not any(map(known.choice, sizes))


def ranges(problems: Mapping[Varying, int]) -> list[Range]:
    """The ranges of a graph's problems, in order of size.

    Args:
        problems: By problem of the graph, how often it occurs.
    """
    plans = {v: candidates(v) for v in problems}
    borders = sorted({1}.union(*(known.borders() for known in plans.values())))
    critical = set(borders).union(*(known.critical() for known in plans.values()))
    sizes = sorted({*COMPARED, *critical, *(size - 1 for size in critical if size > 1)})
    whole = [sum(n * plans[v].at(size)[0].price for v, n in problems.items()) for size in sizes]
    tables = {v: _Table(plans[v], count, sizes, whole) for v, count in problems.items()}
    found: list[Range] = []
    for start, end in pairwise(_cuts(list(tables.values()), [*map(sizes.index, borders)])):
        chosen = {v: table.best(start, end)[1] for v, table in tables.items()}
        if found and found[-1].plans == chosen:
            continue
        if found:
            found[-1] = replace(found[-1], high=sizes[start])
        found.append(Range(sizes[start], None, chosen))
    return found


def break_even(varying: Varying, name: str) -> str:
    """The sizes for which the adapter is merged into its base weight, as inequalities.

    Args:
        varying: The problem.
        name: What the size is called.
    """
    known = candidates(varying)
    said: dict[str, list[str]] = {}
    for phase, backward in (("the forward", False), ("the backward", True)):
        if not any(demand.backward == backward for demand in varying.problem.demands):
            continue
        merges = [_merges(varying.problem, plan, backward) for plan in known.plans]
        # For experts the border is named as a guard names it: by the least size that merges.
        as_guard = bool(varying.problem.assignments)
        when = _when(lambda size, merges=merges: merges[known.choice(size)], name, as_guard)  # type: ignore[misc]
        said.setdefault(when, []).append(phase)
    if len(said) == 1:
        return next(iter(said))
    return ", ".join(f"in {' and '.join(where)} {when}" for when, where in said.items())


def merges_above(varying: Varying, size: int) -> bool:
    """True if at some larger size a plan merges the adapter, and at this size none does."""
    known = candidates(varying)
    merging = {
        i
        for i, plan in enumerate(known.plans)
        if plan is not None and any(_merges(varying.problem, plan, b) for b in (False, True))
    }
    if known.choice(size) in merging:
        return False
    return any(known.choice(larger) in merging for larger in COMPARED if larger > size)


class _Table:
    """The savings of the plans of one problem at all sizes, as shares of the whole graph.

    A size is weighted by the logarithm of its ratio to the next size.

    Attributes:
        plans: The plans; the first is the graph as it came.
        ideal: The savings of the best plan of every size, added up over the sizes.
    """

    def __init__(
        self, known: PricedPlans, count: int, sizes: Sequence[int], whole: Sequence[Price]
    ) -> None:
        """Compare the plans of a problem.

        Args:
            known: The plans and their prices.
            count: How often the problem occurs in the graph.
            sizes: The sizes at which plans are compared, in order.
            whole: By size, the price of the whole incoming graph.
        """
        self.plans = known.plans
        weights = [log2(high / low) for low, high in pairwise([*sizes, 2 * sizes[-1]])]
        prices = list(zip(*([p.price for p in known.at(size)] for size in sizes), strict=True))
        saved = [
            [
                weight * count * (old - new) / all_ if all_ else 0.0
                for old, new, weight, all_ in zip(prices[0], row, weights, whole, strict=True)
            ]
            for row in prices
        ]
        shares = [
            [
                weight * (1 - new / old) if old else 0.0
                for old, new, weight in zip(prices[0], row, weights, strict=True)
            ]
            for row in prices
        ]
        number = range(len(self.plans))
        self.ideal = sum(map(max, zip(*saved, strict=True)))
        self._margin = known.varying.objective.margin
        self._weights = _sums(weights)
        self._saved = [_sums(row) for row in saved]
        self._shares = [_sums(row) for row in shares]
        self._dearer = [_sums([float(known.is_dearer(i, size)) for size in sizes]) for i in number]
        self._worth = [_sums([float(known.is_worth(i, size)) for size in sizes]) for i in number]

    def best(self, start: int, end: int) -> tuple[float, Plan | None]:
        """The plan that saves most in a range and is dearer nowhere in it; with its saving."""
        least = self._margin * (self._weights[end] - self._weights[start])
        chosen, most = 0, 0.0
        for i in range(1, len(self.plans)):
            if self._dearer[i][end] > self._dearer[i][start]:
                continue
            if self._worth[i][end] == self._worth[i][start]:
                continue
            saved = self._saved[i][end] - self._saved[i][start]
            if saved > most and self._shares[i][end] - self._shares[i][start] >= least:
                chosen, most = i, saved
        return most, self.plans[chosen]


def _cuts(tables: Sequence[_Table], borders: Sequence[int]) -> list[int]:
    """Where to cut the sizes into ranges.

    Args:
        tables: By problem, the savings of its plans.
        borders: Indices of the sizes at which a range may begin, the first of them 0.

    Returns:
        Some of the borders, the first among them; then the number of sizes.
    """
    ends = [*borders, len(tables[0]._weights) - 1]
    last = len(ends) - 1
    score = {
        (i, j): sum(table.best(ends[i], ends[j])[0] for table in tables)
        for i in range(last)
        for j in range(i + 1, last + 1)
    }
    ideal = sum(table.ideal for table in tables)
    # Dynamic programming: the best way to cut the sizes before the j-th border into one range more.
    best = {j: (score[0, j], [0, j]) for j in range(1, last + 1)}
    for _ in range(_MAX_RANGES - 1):
        if best[last][0] >= _ENOUGH * ideal:
            break
        best = {
            j: max(
                [best[j], *((best[i][0] + score[i, j], [*best[i][1], j]) for i in range(1, j))],
                key=lambda found: found[0],
            )
            for j in range(1, last + 1)
        }
    return [ends[i] for i in best[last][1]]


def _sums(row: Sequence[float]) -> list[float]:
    """By index, the sum of all earlier entries."""
    return list(accumulate(row, initial=0.0))


def _when(holds: Callable[[int], bool], name: str, as_guard: bool = False) -> str:
    """The sizes for which a condition holds; ``as_guard`` writes ``N >= 77`` for ``N > 76``."""
    at = [holds(size) for size in COMPARED]
    if all(at) or not any(at):
        return "always" if at[0] else "never"
    flips = [
        first_size(lambda size, now=now: holds(size) == now, low, high) - 1  # type: ignore[misc]
        for (low, high), (before, now) in zip(pairwise(COMPARED), pairwise(at), strict=True)
        if before != now
    ]
    starts = [0, *flips] if at[0] else flips
    spans = []
    for i in range(0, len(starts), 2):
        low, *high = starts[i : i + 2]
        text = f"{low} < {name}" if low and high else f"{name} > {low}" if low else name
        if low and as_guard:
            text = f"{low + 1} <= {name}" if high else f"{name} >= {low + 1}"
        spans.append(f"{text} <= {high[0]}" if high else text)
    return "when " + " or ".join(spans)


def _merges(problem: Problem, plan: Plan | None, backward: bool) -> bool:
    """True if a plan multiplies by a merged matrix in one phase."""
    steps = problem.incoming if plan is None else plan.steps.items()
    return any(
        value.backward == backward
        and isinstance(step, Product | StackProduct | Pick | Accumulate)
        and any(map(_is_merged, _multiplied(step)))
        for value, step in steps
    )


def _multiplied(step: Step) -> tuple[Polynomial, ...]:
    """The operands that a step multiplies or picks."""
    return (step.left, step.right) if isinstance(step, Accumulate) else step.operands


def _is_merged(operand: Polynomial) -> bool:
    lengths = [len(word.factors) for word in operand.words]
    return len(lengths) > 1 and min(lengths) == 1 < max(lengths)
