"""The search against brute force, against the paper's catalogue, and its rules one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sympy.utilities.iterables import multiset_partitions

from runlora_fx.cost_model.objective import Objective
from runlora_fx.passes.algebra import (
    Factor,
    Polynomial,
    Word,
    normalise,
    polynomial,
)
from runlora_fx.passes.plan import (
    Keep,
    LeafSpec,
    Problem,
    Product,
    Step,
    Sum,
    Value,
    step_cost,
)
from runlora_fx.passes.search import cheapest

FLOPS = Objective("flops")

# -- brute force -------------------------------------------------------------------------------


def product_splits(p: Polynomial) -> Iterator[Product]:
    """Every ``L @ R == p``, found by cutting every word everywhere."""
    for cuts in itertools.product(*(range(1, len(word.factors)) for word in p.words)):
        table = {
            (word.factors[:i], word.factors[i:]): (word, c)
            for i, (word, c) in zip(cuts, p.terms, strict=True)
        }
        lefts, rights = (list(dict.fromkeys(pair[side] for pair in table)) for side in (0, 1))
        if len(table) != len(lefts) * len(rights):
            continue
        # All scalar leaves go left, which is right where every row of the table has its own.
        left = polynomial(
            (Word(u, table[u, rights[0]][0].scalars), table[u, rights[0]][1]) for u in lefts
        )
        first = table[lefts[0], rights[0]][1]
        right = polynomial((Word(v), table[lefts[0], v][1] / first) for v in rights)
        if (left @ right).close_to(p):
            yield Product(left, right)


def ways(problem: Problem, value: Value) -> Iterator[Step]:
    """Every step towards a value."""
    for made, step in problem.incoming:
        if made == value:
            yield step
    if value.backward and value.core in problem.kept:
        yield Keep()
    yield from product_splits(value.core)
    for parts in multiset_partitions(list(value.core.terms)):
        if len(parts) > 1:
            yield Sum(tuple(polynomial(part) for part in parts))


def brute_force(problem: Problem) -> int | None:
    """The price of the cheapest of all plans, each of them tried; None if there is none."""
    best: int | None = None

    def operands(value: Value, step: Step) -> set[Value]:
        if isinstance(step, Keep):
            return {Value(value.core, False)}
        found = set()
        for p in step.parts if isinstance(step, Sum) else (step.left, step.right):
            core = normalise(p).core
            tangent = any(problem.leaves[i].backward for i in core.leaves)
            found.add(Value(core, value.backward or tangent))
        return found

    def is_given(value: Value) -> bool:
        factor = value.core.leaf
        return factor is not None and (not value.backward or problem.leaves[factor.leaf].held)

    def visit(pending: frozenset[Value], made: frozenset[Value], paid: int) -> None:
        nonlocal best
        if best is not None and paid >= best:
            return
        if not pending:
            best = paid
            return
        value = next(iter(pending))
        if value.core.leaf is not None:
            return
        made |= {value}
        for step in ways(problem, value):
            below = {v for v in operands(value, step) if not is_given(v)} - made
            price = int(FLOPS.price(step_cost(problem, value.core, step)))
            visit((pending | below) - {value}, made, paid + price)

    visit(frozenset(v for v in problem.demands if not is_given(v)), frozenset(), 0)
    return best


@st.composite
def problems(draw: st.DrawFn, *, joint: bool) -> Problem:
    """Small problems: up to two demands of up to three words over five leaves."""
    dims = tuple(draw(st.lists(st.sampled_from([2, 3, 5, 8, 21]), min_size=4, max_size=4)))
    # Every leaf joins two different dimensions, so that no word can repeat a leaf at once.
    sides = st.permutations(range(4)).map(lambda order: order[:2])
    extents = draw(st.lists(sides, min_size=5, max_size=5))
    flags = draw(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=5, max_size=5))
    leaves = tuple(
        LeafSpec(rows, cols, backward=joint and i == 0, held=not joint or i == 0 or held)
        for i, ((rows, cols), (held, _)) in enumerate(zip(extents, flags, strict=True))
    )
    problem = Problem(leaves, dims, (), (), frozenset(), 4)
    factors = [Factor(i, t) for i in range(5) for t in (False, True)]

    def chains(length: int) -> list[tuple[Factor, ...]]:
        if length == 1:
            return [(f,) for f in factors]
        return [
            (*chain, f)
            for chain in chains(length - 1)
            for f in factors
            if problem.extent(chain[-1])[1] == problem.extent(f)[0]
            and f.leaf not in {g.leaf for g in chain}
        ]

    words = [*chains(2), *chains(3), *chains(4)][:400]
    assume(words)
    demands = []
    for _ in range(draw(st.integers(1, 2))):
        first = draw(st.sampled_from(words))
        ends = problem.extent(first[0])[0], problem.extent(first[-1])[1]
        alike = [w for w in words if (problem.extent(w[0])[0], problem.extent(w[-1])[1]) == ends]
        chosen = {first, *draw(st.lists(st.sampled_from(alike), max_size=2))}
        numbers = st.sampled_from([1.0, 2.0])
        p = polynomial((Word(w), draw(numbers)) for w in sorted(chosen))
        tangent = any(leaves[i].backward for i in p.leaves)
        demands.append(Value(normalise(p).core, tangent or (joint and draw(st.booleans()))))
    kept = frozenset(
        normalise(polynomial([(Word(w), 1.0)])).core
        for w in chains(2)
        if joint and flags[w[0].leaf][1] and not any(leaves[f.leaf].backward for f in w)
    )
    return replace(problem, demands=tuple(dict.fromkeys(demands)), kept=kept)


small = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@small
@given(problems(joint=False))
def test_inference_problems_as_cheap_as_brute_force(problem: Problem) -> None:
    plan = cheapest(problem, FLOPS)
    assert FLOPS.price(plan.cost(problem)) == brute_force(problem)


@small
@given(problems(joint=True))
def test_joint_problems_as_cheap_as_brute_force(problem: Problem) -> None:
    expected = brute_force(problem)
    if expected is None:
        with pytest.raises(ValueError, match="no plan"):
            cheapest(problem, FLOPS)
    else:
        assert FLOPS.price(cheapest(problem, FLOPS).cost(problem)) == expected
