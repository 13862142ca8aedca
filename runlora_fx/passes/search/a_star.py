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
from dataclasses import dataclass
from itertools import count

from runlora_fx.cost_model.objective import Objective, Price
from runlora_fx.cost_model.ops import GemmShape, MatMul
from runlora_fx.passes.algebra.plan import (
    Plan,
    Problem,
    Step,
    Sum,
    Value,
    incoming_operations,
    step_operation,
)
from runlora_fx.passes.algebra.polynomials import (
    Polynomial,
    normalise,
)
from runlora_fx.passes.search.ways import Ways

#: Values in the frontiers that are looked at before the search gives up, after some ten seconds.
#: Real models need some thousands; counted, for a plan must not depend on the machine's load.
_EFFORT = 2_000_000

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
