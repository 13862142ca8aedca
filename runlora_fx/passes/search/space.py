"""Search space: all values that plans of a problem may make, numbered in the order of decisions.

Before -> after: ``Ways`` (steps, prices and operands, listed on demand) -> a table in which values
are numbers, and a set of values is an integer with one bit for each.

Invariant: a value has a higher number than all values that its ways read. So a search that decides
from high to low numbers decides about each value once. Of all such orders, one is chosen in which
few values are open at a time: all that only one use of a weight needs, then the next use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from runlora_fx.cost_model.objective import Objective, Price
from runlora_fx.passes.algebra.problem import Problem, Value
from runlora_fx.passes.algebra.steps import Step
from runlora_fx.passes.search.ways import Way, Ways

#: The number of values for which all ways are listed: for each incoming step, and at least. For
#: further values only the incoming ways are listed, and those that split sums into words.
_VALUES_PER_STEP = 20
_VALUES = 1_000

#: Open values that wait for at most this number of undecided values count as equally near.
_FEW = 4

#: One way in numbers: its index among the value's ways, its price, the set of values that it reads.
Choice = tuple[int, Price, int]


@dataclass(frozen=True)
class Space:
    """The values of a problem and the ways to make them, by number.

    Attributes:
        values: By number.
        ways: By number, the ways that may be part of a cheapest plan.
        choices: The same as prices and sets.
        few: The same, without most ways to split a sum.
        came: The same, with only the incoming ways for values that the incoming graph makes.
        start: The demands that need a step, as a set.
        is_whole: True if every way was listed.
        least: By number, a lower bound of the price of a value, with its share in its operands. The
            bound of an operand is divided among all values that may read it.
        readers: By number, the values that may read it, as a set.
        read_demands: The demands that other values may read, as a set.
        unread: By number, the bounds of all other demands below it, added up.
    """

    values: tuple[Value, ...]
    ways: tuple[tuple[Way, ...], ...]
    choices: tuple[tuple[Choice, ...], ...]
    few: tuple[tuple[Choice, ...], ...]
    came: tuple[tuple[Choice, ...], ...]
    start: int
    is_whole: bool
    least: tuple[float, ...]
    readers: tuple[int, ...]
    read_demands: int
    unread: tuple[float, ...]

    def share(self, value: int, decided: int) -> float:
        """The least that a value adds to the price while values below ``decided`` are undecided.

        The shares of undecided readers are left out, because the bounds of these readers have them.
        """
        is_demand = self.start >> value & 1
        readers = self.readers[value]
        all_of_them = readers.bit_count() + is_demand
        undecided = (readers & ((1 << decided) - 1)).bit_count()
        return self.least[value] * (1 - undecided / all_of_them)


@lru_cache(maxsize=256)
def space_of(problem: Problem, objective: Objective) -> Space:
    """The search space of a problem.

    Args:
        problem: What to compute.
        objective: How steps are priced.

    Raises:
        ValueError: If no plan exists.
    """
    ways = Ways(problem, objective)
    start = [d for d in dict.fromkeys(problem.demands) if not ways.is_given(d)]
    listed, is_whole = _listed(ways, start)
    table = _feasible(ways, listed)
    if not all(table.get(demand) for demand in start):
        raise ValueError(f"no plan for {problem.demands}")
    values = _ordered(ways, table, start)
    number = {value: i for i, value in enumerate(values)}

    def as_set(some: Iterable[Value]) -> int:
        return sum(1 << number[value] for value in some)

    found = tuple(tuple(table[value]) for value in values)
    choices = tuple(
        tuple((i, way.price, as_set(way.reads)) for i, way in enumerate(own)) for own in found
    )

    def restricted(steps_of: Callable[[Value], Collection[Step]]) -> tuple[tuple[Choice, ...], ...]:
        """The ways by some steps only; all of a value that has none of them."""
        return tuple(
            tuple(choice for choice in own if found[i][choice[0]].step in steps) or own
            for i, own in enumerate(choices)
            for steps in [steps_of(values[i])]
        )

    readers = [0] * len(values)
    for i, value in enumerate(values):
        for operand in _read(table[value]):
            readers[number[operand]] |= 1 << i
    demanded = as_set(start)
    least: list[float] = []
    for own in choices:
        bounds = (
            float(price)
            + sum(least[i] / (readers[i].bit_count() + (demanded >> i & 1)) for i in members(read))
            for _, price, read in own
        )
        least.append(min(bounds))
    read_demands = sum(1 << i for i in members(demanded) if readers[i])
    alone = (bound if (demanded & ~read_demands) >> i & 1 else 0.0 for i, bound in enumerate(least))
    unread = tuple(accumulate(alone, initial=0.0))
    return Space(
        values=tuple(values),
        ways=found,
        choices=choices,
        few=restricted(ways.simple_steps),
        came=restricted(ways.taken),
        start=demanded,
        is_whole=is_whole,
        least=tuple(least),
        readers=tuple(readers),
        read_demands=read_demands,
        unread=unread,
    )


def members(of: int) -> list[int]:
    """The numbers in a set."""
    found = []
    while of:
        lowest = of & -of
        found.append(lowest.bit_length() - 1)
        of ^= lowest
    return found


def _listed(ways: Ways, start: Collection[Value]) -> tuple[dict[Value, list[Way]], bool]:
    """All values that some way needs, with their ways; True beside them if no way was left out."""
    limit = max(_VALUES, _VALUES_PER_STEP * len(ways.problem.incoming))
    listed: dict[Value, list[Way]] = {}
    seen = dict.fromkeys(start)
    pending = list(start)
    is_whole = True
    for value in pending:
        if len(seen) < limit:
            listed[value] = ways.of(value)
        else:
            listed[value] = ways.simple(value)
            is_whole = False
        for way in listed[value]:
            new = sorted((v for v in way.reads if v not in seen), key=ways.rank)
            seen.update(dict.fromkeys(new))
            pending.extend(new)
    return listed, is_whole


def _feasible(ways: Ways, listed: Mapping[Value, list[Way]]) -> dict[Value, list[Way]]:
    """The ways that lead to a plan, without those that another way makes redundant."""
    table: dict[Value, list[Way]] = {}
    for value in sorted(listed, key=ways.rank):
        possible = [way for way in listed[value] if all(table[v] for v in way.reads)]
        if value != ways.problem.demands[0]:  # its first steps are compared for the report
            came = ways.taken(value)
            possible = [
                way
                for i, way in enumerate(possible)
                if way.step in came or not _is_needless(i, possible)
            ]
        table[value] = possible
    return table


def _is_needless(index: int, ways: Sequence[Way]) -> bool:
    """True if another way costs no more and reads only values that this one reads too."""
    own = ways[index]
    return any(
        other.price <= own.price
        and other.reads <= own.reads
        # Of two ways that are equal in both, the first one is kept.
        and (i < index or other.price < own.price or other.reads < own.reads)
        for i, other in enumerate(ways)
        if i != index
    )


def _read(ways: Iterable[Way]) -> dict[Value, None]:
    """All values that some ways read."""
    return dict.fromkeys(value for way in ways for value in way.reads)


def _ordered(ways: Ways, table: Mapping[Value, list[Way]], start: Collection[Value]) -> list[Value]:
    """The values that the demands may need: operands first, few of them open at a time.

    A value is open while some of its readers are decided and some are not. The next value is the
    one that was opened last and waits for few undecided values, and these come before it. So the
    values of one use of a weight are decided before the next use begins, and shared values come
    last.
    """
    read: dict[Value, list[Value]] = {}
    pending = list(start)
    for value in pending:
        if value not in read:
            read[value] = list(_read(table[value]))
            pending.extend(read[value])
    ranked = sorted(read, key=ways.rank)
    number = {value: i for i, value in enumerate(ranked)}
    reads = [sum(1 << number[v] for v in read[value]) for value in ranked]
    above = [0] * len(ranked)  # all that is made from a value, directly or not
    for i in reversed(range(len(ranked))):
        for operand in members(reads[i]):
            above[operand] |= above[i] | 1 << i
    demands = sum(1 << number[v] for v in start)
    undecided, opened = (1 << len(ranked)) - 1, 0
    since = {number[v]: 0 for v in start}
    order: list[int] = []
    while undecided:
        open_ = opened & undecided & ~demands
        waits = {i: (above[i] & undecided).bit_count() for i in members(open_)}
        found = max(
            waits or members(demands & undecided),
            key=lambda i: (-max(waits.get(i, 0), _FEW), since[i], -waits.get(i, 0), i),
        )
        for i in reversed(members((above[found] | 1 << found) & undecided)):
            order.append(i)
            undecided ^= 1 << i
            opened |= reads[i]
            for j in members(reads[i]):
                since.setdefault(j, len(order))
    return [ranked[i] for i in reversed(order)]
