"""Frontier search: the cheapest plan for all demands of a problem together.

A plan makes every value once, however many steps read it, so its price is that of a DAG. The search
decides about values in the order of :mod:`~runlora_fx.passes.search.space`. Its state is a
*frontier*: the set of values that are still to be made. It takes the value with the highest number,
which no undecided value reads, adds the price of one way to make it, and replaces it by the
operands of that way. Of two equal frontiers only the cheaper one is kept. A frontier is dropped if
its price plus a lower bound of the rest exceeds the price of the best plan so far, which is first
the incoming graph.

Before -> after: ``X W' + 2 X A' B'`` as it came, a sum of two products -> ``X (W' + 2 A' B')``.

Invariant: a plan is called *exact* only if the bound was the only reason to drop frontiers. If more
frontiers remain than fit, the most promising are kept, and the plan is called *best found*. No plan
is dearer than the incoming graph. Work is counted, not timed, so plans do not depend on a clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Literal, TypeAlias

from runlora_fx.cost_model.objective import Objective, Price
from runlora_fx.cost_model.ops import MatMul, Merge, Shape
from runlora_fx.passes.algebra.implementations import serving
from runlora_fx.passes.algebra.plan import Plan, incoming_operations
from runlora_fx.passes.algebra.problem import Problem, Value
from runlora_fx.passes.algebra.steps import Step
from runlora_fx.passes.algebra.sums import accumulated, flattened
from runlora_fx.passes.algebra.work import Work
from runlora_fx.passes.search.space import Choice, Space, members, space_of
from runlora_fx.passes.search.ways import Way, Ways

#: The number of frontiers that are kept for each value: in the first search, and in wider ones that
#: follow while the plan is not exact. The work of a search is proportional to it.
WIDTHS = (16, 128, 1024, 4096)

#: The largest number of ways that a search may try, and the addition for each incoming step.
#: Searches are narrow enough to stay below. A million ways take about three seconds.
_EFFORT, _EFFORT_PER_STEP = 200_000, 300

#: The largest number of values that are visited to find products to measure.
_VALUES = 5_000

#: Bounds are sums of floats. One that exceeds the best price by less than this share may be equal
#: to it.
_ROUNDING = 1e-9

Proof: TypeAlias = Literal["exact", "best found"]

#: The decisions that led to a frontier, latest first: a value, the index of its way, the earlier
#: ones.
_Path: TypeAlias = "tuple[int, int, _Path] | None"


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        plan: The plan.
        proof: ``"exact"`` if no plan is cheaper; ``"best found"`` if not all were compared.
        effort: The number of ways that were tried.
    """

    plan: Plan
    proof: Proof
    effort: int


@dataclass
class _Sweep:
    """The result of one pass over all values.

    Attributes:
        price: The price of the cheapest plan, if there is one within the limit.
        path: Its decisions.
        effort: The number of ways that were tried.
        is_complete: True if the bound was the only reason to drop frontiers.
    """

    price: Price | None = None
    path: _Path = None
    effort: int = 0
    is_complete: bool = True


def search(
    problem: Problem,
    objective: Objective,
    first: Step | None = None,
    widths: tuple[int, ...] = WIDTHS,
) -> Found:
    """The plan with the least price among all ways that :class:`Ways` knows.

    Args:
        problem: What to compute.
        objective: How steps are priced.
        first: If given, the step that the first demand must take, to ask for example what the plan
            would cost if the weight were merged.
        widths: The number of frontiers to keep for each value, in the first search and in the next.

    Raises:
        ValueError: If no plan exists.
    """
    space = space_of(problem, objective)
    stages = list(dict.fromkeys([space.came, space.few, space.choices]))
    if first is not None:
        demand = space.values.index(problem.demands[0])
        forced = tuple(c for c in space.choices[demand] if space.ways[demand][c[0]].step == first)
        stages = [(*ways[:demand], forced, *ways[demand + 1 :]) for ways in stages]
    best, effort, is_exact = _Sweep(), 0, False
    limit = effort_limit(problem)
    for choices in stages:
        per_width = 0.0
        fitting = max(1, limit // (1 + sum(map(len, choices))))
        for width in (min(widths[0], fitting), *widths[1:]):
            if per_width * width > limit:
                break
            found = _swept(space, choices, width, best.price)
            effort += found.effort
            per_width = found.effort / width
            if found.price is not None and (best.price is None or found.price < best.price):
                best = found
            if found.is_complete:
                is_exact = choices is stages[-1] and space.is_whole
                break
    if best.price is None:
        raise ValueError(f"no plan for {problem.demands}")
    ways = Ways(problem, objective)
    chosen = _chosen(space, best.path)
    flat = flattened(problem, {value: way.step for value, way in chosen.items()})
    names = {v: w.implementation for v, w in chosen.items() if flat.get(v) == w.step}
    plan = accumulated(problem, Plan(flat, names))
    names = {
        value: plan.implementations.get(value) or ways.cheapest(value, step).implementation
        for value, step in plan.steps.items()
    }
    return Found(
        Plan(plan.steps, names).laid(problem), "exact" if is_exact else "best found", effort
    )


def effort_limit(problem: Problem) -> int:
    """How many ways may be tried for a problem before no wider search is begun."""
    return _EFFORT + _EFFORT_PER_STEP * len(problem.incoming)


def first_steps(problem: Problem, objective: Objective) -> tuple[Step, ...]:
    """The steps that the first demand can take, most promising first; none if it needs no step."""
    space = space_of(problem, objective)
    if problem.demands[0] not in space.values:
        return ()
    demand = space.values.index(problem.demands[0])

    def promise(choice: Choice) -> float:
        _, price, read = choice
        return float(price) + sum(space.least[i] for i in members(read))

    promising = sorted(space.choices[demand], key=promise)
    return tuple(dict.fromkeys(space.ways[demand][way].step for way, *_ in promising))


def _chosen(space: Space, path: _Path) -> dict[Value, Way]:
    """The ways of some decisions."""
    chosen = {}
    while path is not None:
        value, way, path = path
        chosen[space.values[value]] = space.ways[value][way]
    return chosen


def _swept(
    space: Space, choices: Sequence[Sequence[Choice]], width: int, limit: Price | None
) -> _Sweep:
    """Decide about all values, from high to low.

    Args:
        space: The values and their ways.
        choices: The ways to try.
        width: Frontiers to keep for each value.
        limit: A price that a plan need not exceed.
    """
    found = _Sweep()
    most = None if limit is None else float(limit) * (1 + _ROUNDING)
    # By their highest value: what was paid for a frontier, the bound of its plans, and its path.
    open_: list[dict[int, tuple[Price, float, _Path]]] = [{} for _ in space.values]
    if space.start:
        open_[space.start.bit_length() - 1][space.start] = (0, 0.0, None)
    else:
        found.price = 0
    for value in reversed(range(len(space.values))):
        frontiers, open_[value] = open_[value], {}
        if not frontiers:
            continue
        chosen = list(frontiers.items())
        if len(chosen) > width:
            found.is_complete = False
            chosen = nsmallest(width, chosen, key=lambda item: item[1][1])
        demands = space.start & ((1 << value) - 1)
        base = space.unread[value] + sum(
            space.share(i, value) for i in members(demands & space.read_demands)
        )
        shares: dict[int, float] = {}
        for frontier, (paid, _, path) in chosen:
            rest = frontier ^ (1 << value)
            for way, price, read in choices[value]:
                found.effort += 1
                state, total = rest | read, paid + price
                if not state:
                    if found.price is None or total < found.price:
                        found.price, found.path = total, (value, way, path)
                    continue
                below = open_[state.bit_length() - 1]
                known = below.get(state)
                if known is not None and known[0] <= total:
                    continue
                bound = float(total) + base
                others = state & ~demands
                while others:
                    lowest = others & -others
                    share = shares.get(lowest)
                    if share is None:
                        share = shares[lowest] = space.share(lowest.bit_length() - 1, value)
                    bound += share
                    others ^= lowest
                if most is None or bound <= most:
                    below[state] = (total, bound, (value, way, path))
    return found


def candidate_products(problem: Problem, objective: Objective) -> list[Shape]:
    """The products and merges of all plans that could be cheaper than the incoming graph.

    A product that is predicted to cost twice as much as the whole incoming graph is left out.
    """
    ways = Ways(problem, objective)
    limit = 2 * objective.total(incoming_operations(problem))
    found: dict[Shape, None] = {}
    pending, seen = list(problem.demands), set(problem.demands)
    while pending and len(seen) < _VALUES:
        value = pending.pop()
        for way in ways.of(value):
            if way.price > limit:
                continue
            found.update(dict.fromkeys(_shapes(problem, value, way.step)))
            pending.extend(way.reads - seen)
            seen |= way.reads
        for step in ways.merges(value):
            found.update(dict.fromkeys(_shapes(problem, value, step)))
    return list(found)


def _shapes(problem: Problem, value: Value, step: Step) -> Iterator[Shape]:
    """What could be measured of a step: products, and merges both ways."""
    work = Work(problem, value.core, step, problem.dims)
    for one in serving(work):
        for operation in one.operations(work):
            if isinstance(operation, MatMul):
                yield operation.shape
            elif isinstance(operation, Merge):
                yield from operation.shape.pair
