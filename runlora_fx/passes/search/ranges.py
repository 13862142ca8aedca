"""Ranges: which plan is best for which sizes, where one dimension varies from call to call.

One graph serves many sizes, and each plan is best in a range of them. A guard at the border of a
range costs a compilation for each side, so that there should be few: borders are placed where they
save the most over all sizes, for all problems of the graph together, and no graph is dearer at any
size than it came.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise

from runlora_fx.cost_model.objective import Objective, Price
from runlora_fx.passes.algebra.plan import Plan, Problem, Product, incoming_operations
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.search.frontiers import search

#: Sizes at which plans are searched, and sizes at which they are compared [elements].
_SEARCHED = (1, 16, 64, 256, 1024, 4096, 32768)
_COMPARED = tuple(dict.fromkeys(round(2 ** (k / 2)) for k in range(35)))

#: How wide plans are searched at each of these sizes; only a few problems need more.
_WIDTHS = (16, 128)

#: At most so many ranges, and no more than are needed for this share of what could be saved.
_MAX_RANGES = 4
_ENOUGH = 0.9

#: A plan this much dearer than another costs the same: sums of floats in another order.
_ROUNDING = 1e-9


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

    def price(self, plan: Plan | None, size: int) -> Price:
        """The price of a plan, or of the graph as it came, at a size."""
        problem = _sized(self.problem, self.dims, size)
        if plan is None:
            return self.objective.total(incoming_operations(problem))
        return self.objective.total(plan.operations(problem))


@dataclass(frozen=True)
class Range:
    """Sizes that are served by the same plans.

    Attributes:
        low: The least size.
        high: The size above the largest, or None if there is no largest.
        plans: For each problem the plan, or None for the graph as it came.
    """

    low: int
    high: int | None
    plans: Mapping[Varying, Plan | None]

    def contains(self, size: int) -> bool:
        """Whether a size is served by these plans."""
        return self.low <= size and (self.high is None or size < self.high)

    def named(self, size: object) -> str:
        """The range as an inequality; nothing if it holds for all sizes."""
        if self.high is None:
            return f"{size} >= {self.low}" if self.low > 1 else ""
        return f"{self.low} <= {size} < {self.high}" if self.low > 1 else f"{size} < {self.high}"


@lru_cache(maxsize=1024)
def candidates(varying: Varying) -> tuple[Plan | None, ...]:
    """The graph as it came (None) and every plan that is the cheapest at some size."""
    found: dict[frozenset[object], Plan | None] = {frozenset(): None}
    for size in _SEARCHED:
        plan = search(
            _sized(varying.problem, varying.dims, size), varying.objective, widths=_WIDTHS
        ).plan
        found.setdefault(frozenset(plan.steps.items()), plan)
    return tuple(found.values())


def ranges(problems: Mapping[Varying, int]) -> list[Range]:
    """The ranges of a graph's problems, in order of size.

    Args:
        problems: All that the graph has to compute, and how often each.
    """
    whole = [sum(n * v.price(None, size) for v, n in problems.items()) for size in _COMPARED]
    tables = {v: _Table(v, count, whole) for v, count in problems.items()}
    found: list[Range] = []
    for start, end in pairwise(_cuts(list(tables.values()))):
        plans = {v: table.best(start, end)[1] for v, table in tables.items()}
        low = _border(problems, found[-1], plans, start, end) if found else 1
        if low is None:
            continue  # among others, because they are the same plans
        if found:
            found[-1] = replace(found[-1], high=low)
        found.append(Range(low, None, plans))
    return found


def break_even(varying: Varying, name: str) -> str:
    """For which sizes the cheapest plan merges the adapter into its base weight, as inequalities.

    Args:
        varying: The problem.
        name: What the size is called.
    """
    plans = candidates(varying)
    said: dict[str, list[str]] = {}
    for phase, backward in (("the forward", False), ("the backward", True)):
        if not any(demand.backward == backward for demand in varying.problem.demands):
            continue

        def merging(size: int, backward: bool = backward) -> bool:
            best = min(plans, key=lambda plan: varying.price(plan, size))
            return _merges(varying.problem, best, backward)

        said.setdefault(_when(merging, name), []).append(phase)
    if len(said) == 1:
        return f"merge {next(iter(said))}"
    return "merge " + ", ".join(f"in {' and '.join(where)} {when}" for when, where in said.items())


class _Table:
    """What the plans of one problem save at all compared sizes, as a share of the whole graph.

    Attributes:
        plans: The plans; the first is the graph as it came.
        ideal: What the best plan of every size saves, added up over the sizes.
    """

    def __init__(self, varying: Varying, count: int, whole: Sequence[Price]) -> None:
        """Price the plans of a problem.

        Args:
            varying: The problem.
            count: How often the graph has it.
            whole: By size, the price of the graph as it came.
        """
        self.plans = candidates(varying)
        prices = [[varying.price(plan, size) for size in _COMPARED] for plan in self.plans]
        pairs = [list(zip(prices[0], row, strict=True)) for row in prices]
        saved = [
            [count * (old - new) / all_ for (old, new), all_ in zip(row, whole, strict=True)]
            for row in pairs
        ]
        dearer = [[new > old * (1 + _ROUNDING) for old, new in row] for row in pairs]
        shares = [[1 - new / old if old else 0.0 for old, new in row] for row in pairs]
        self.ideal = sum(map(max, zip(*saved, strict=True)))
        self._margin = varying.objective.margin
        self._saved = [list(accumulate(row, initial=0.0)) for row in saved]
        self._shares = [list(accumulate(row, initial=0.0)) for row in shares]
        self._dearer = [list(accumulate(row, initial=0)) for row in dearer]

    def best(self, start: int, end: int) -> tuple[float, Plan | None]:
        """The most that a plan saves in a range without being dearer anywhere, and that plan."""
        safe = [
            i
            for i, (dearer, shares) in enumerate(zip(self._dearer, self._shares, strict=True))
            if dearer[end] == dearer[start]
            and (i == 0 or shares[end] - shares[start] >= self._margin * (end - start))
        ]
        saved = {i: self._saved[i][end] - self._saved[i][start] for i in safe}
        chosen = max(safe, key=lambda i: saved[i])  # the first of equals: the graph as it came
        return saved[chosen], self.plans[chosen]


def _cuts(tables: Sequence[_Table]) -> list[int]:
    """Where to cut the compared sizes into ranges: indices, the first 0, the last their number."""
    end = len(_COMPARED)
    score = {
        (i, j): sum(table.best(i, j)[0] for table in tables)
        for i in range(end)
        for j in range(i + 1, end + 1)
    }
    ideal = sum(table.ideal for table in tables)
    # By dynamic programming: the best way to cut the first j sizes into one range more.
    best = {j: (score[0, j], [0, j]) for j in range(1, end + 1)}
    for _ in range(_MAX_RANGES - 1):
        if best[end][0] >= _ENOUGH * ideal:
            break
        best = {
            j: max(
                [best[j], *((best[i][0] + score[i, j], [*best[i][1], j]) for i in range(1, j))],
                key=lambda found: found[0],
            )
            for j in range(1, end + 1)
        }
    return best[end][1]


def _border(
    problems: Mapping[Varying, int],
    below: Range,
    above: Mapping[Varying, Plan | None],
    start: int,
    end: int,
) -> int | None:
    """The least size from which on the plans of the range above are the cheaper ones.

    It need not lie where the compared sizes were cut: that also keeps every single layer from being
    dearer than it came, while here all layers count together.

    Args:
        problems: All that the graph has to compute, and how often each.
        below: The range below.
        above: The plans of the range above.
        start: Index of the first compared size in that range.
        end: Index of the first compared size after it.

    Returns:
        The size; None if the plans of the range above are nowhere cheaper.
    """

    def is_above(size: int) -> bool:
        old = sum(count * v.price(below.plans[v], size) for v, count in problems.items())
        new = sum(count * v.price(above[v], size) for v, count in problems.items())
        return new < old * (1 - _ROUNDING)

    first = next((i for i in range(start, end) if is_above(_COMPARED[i])), None)
    if first is None:
        return None
    while _COMPARED[first - 1] > below.low and is_above(_COMPARED[first - 1]):
        first -= 1
    return _first(is_above, max(_COMPARED[first - 1], below.low), _COMPARED[first])


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The least size in (low, high] for which something holds that holds from there on."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _when(holds: Callable[[int], bool], name: str) -> str:
    """For which sizes something holds."""
    at = [holds(size) for size in _COMPARED]
    if all(at) or not any(at):
        return "always" if at[0] else "never"
    flips = [
        _first(lambda size, now=now: holds(size) == now, low, high) - 1  # type: ignore[misc]
        for (low, high), (before, now) in zip(pairwise(_COMPARED), pairwise(at), strict=True)
        if before != now
    ]
    starts = [0, *flips] if at[0] else flips
    spans = []
    for i in range(0, len(starts), 2):
        low, *high = starts[i : i + 2]
        text = f"{low} < {name}" if low and high else f"{name} > {low}" if low else name
        spans.append(f"{text} <= {high[0]}" if high else text)
    return "when " + " or ".join(spans)


def _merges(problem: Problem, plan: Plan | None, backward: bool) -> bool:
    """Whether a plan adds a product onto a matrix before it multiplies by it, in one phase."""
    steps = problem.incoming if plan is None else plan.steps.items()
    return any(
        isinstance(step, Product)
        and value.backward == backward
        and any(map(_is_merged, (step.left, step.right)))
        for value, step in steps
    )


def _is_merged(operand: Polynomial) -> bool:
    lengths = [len(word.factors) for word in operand.words]
    return len(lengths) > 1 and min(lengths) == 1 < max(lengths)


def _sized(problem: Problem, dims: frozenset[int], size: int) -> Problem:
    return replace(
        problem, dims=tuple(size if i in dims else own for i, own in enumerate(problem.dims))
    )
