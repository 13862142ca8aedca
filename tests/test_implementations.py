"""What runs a step: sums that accumulate a product, weights that are kept, weights in four bits."""

from collections import Counter
from dataclasses import replace

import pytest
from test_search import FLOPS, lora_layer, sum_step

from runlora_fx.cost_model.objective import Objective
from runlora_fx.cost_model.ops import Elementwise
from runlora_fx.passes.algebra.implementations import serving, usual
from runlora_fx.passes.algebra.plan import Plan, incoming_cost, with_unpacking
from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar, leaf
from runlora_fx.passes.algebra.problem import LeafSpec, Problem, Value
from runlora_fx.passes.algebra.steps import (
    Accumulate,
    Product,
    Step,
    Sum,
    Unpack,
    product_step,
)
from runlora_fx.passes.algebra.sums import accumulated
from runlora_fx.passes.algebra.work import Work
from runlora_fx.passes.search.decide import decide
from runlora_fx.passes.search.frontiers import search
from runlora_fx.passes.search.ways import Ways

MANY, FEW = (192, 64, 64, 8), (8, 64, 64, 8)
TIME = Objective("time")
X, W, A, B = range(4)
X_, W_, A_, B_ = map(leaf, (X, W, A, B))


def weight(update: Polynomial) -> Polynomial:
    return W_ + update


def names(plan: Plan) -> Counter[str]:
    """How often a plan uses each implementation."""
    return Counter(plan.implementations.values())


def layer(tokens: int, update: Polynomial, **of_weight: int) -> Problem:
    """``Y = X W' + X (update)'`` in inference, as a sum of two products."""
    word = update.T
    down = X_ @ A_.T
    scalar = Scalar(update.terms[0][1], update.terms[0][0].scalars)
    up = product_step(down, B_.T)
    made = X_ @ weight(update).T
    steps: list[tuple[Polynomial, Step]] = [
        (X_ @ W_.T, product_step(X_, W_.T)),
        (down, product_step(X_, A_.T)),
        (down @ B_.T, up),
        (made, sum_step([X_ @ W_.T, (down @ B_.T).scaled(scalar)])),
    ]
    assert (X_ @ word).close_to((down @ B_.T).scaled(scalar))
    leaves = (
        LeafSpec(0, 1),
        replace(LeafSpec(2, 1), **of_weight),
        LeafSpec(3, 1),
        LeafSpec(2, 3),
    )
    empty = Problem(leaves, (tokens, 64, 96, 4), (), (), frozenset(), 4)
    incoming = tuple((empty.value(p, False), step) for p, step in steps)
    return with_unpacking(replace(empty, demands=(incoming[-1][0],), incoming=incoming))


UPDATE = (B_ @ A_).scaled(Scalar(2.0))


# --- sums that accumulate a product


def test_a_merged_weight_is_one_step() -> None:
    plan = search(layer(500, UPDATE), FLOPS).plan
    assert names(plan) == {"addmm": 1, "matmul": 1}
    (step,) = [step for step in plan.steps.values() if isinstance(step, Accumulate)]
    assert step.addend + step.left @ step.right in (weight(UPDATE), weight(UPDATE).T)


@pytest.mark.parametrize("objective", [FLOPS, TIME], ids=["flops", "time"])
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_accumulation_changes_no_price(shape: tuple[int, ...], objective: Objective) -> None:
    problem = lora_layer(shape)
    first: dict[Value, Step] = {}
    for value, step in problem.incoming:
        first.setdefault(value, step)
    for steps in (first, _split(search(problem, objective).plan)):
        plan = Plan(steps)
        ours = accumulated(problem, plan)
        assert ours.cost(problem) == plan.cost(problem)


def _split(plan: Plan) -> dict[Value, Step]:
    """The steps of a plan, with a sum and a product for each step that accumulates."""
    steps: dict[Value, Step] = {}
    for value, step in plan.steps.items():
        if isinstance(step, Accumulate):
            product = step.left @ step.right
            made = Product(step.left, step.right).making(product)
            steps[Problem.value(_NO_GRADIENTS, product, value.backward)] = made
            steps[value] = Sum((step.addend, product))
        else:
            steps[value] = step
    return steps


_NO_GRADIENTS = Problem((LeafSpec(0, 0),) * 12, (1,), (), (), frozenset(), 4)


def test_a_demand_stays_a_sum_of_its_own() -> None:
    """Its additions fuse with whatever reads it."""
    plan = search(layer(3, UPDATE), FLOPS).plan
    assert names(plan) == {"matmul": 3, "sum": 1}


# --- merged weights kept from call to call


def test_a_kept_weight_costs_nothing() -> None:
    problem = replace(layer(3, UPDATE), lasting=frozenset({W, A, B}))
    plan = search(problem, FLOPS).plan
    assert names(plan) == {"kept": 1, "matmul": 1}
    assert plan.cost(problem).flops == 2 * 3 * 64 * 96


def test_two_adapters_are_kept_one_after_the_other() -> None:
    c, d = leaf(4), leaf(5)
    whole = weight(UPDATE + d @ c)
    leaves = (*layer(3, UPDATE).leaves, LeafSpec(3, 1), LeafSpec(2, 3))
    problem = replace(layer(3, UPDATE), leaves=leaves, lasting=frozenset({W, A, B, 4, 5}))
    steps = (
        (B_ @ A_, product_step(B_, A_)),
        (d @ c, product_step(d, c)),
        (whole, sum_step([W_, UPDATE, d @ c])),
        (X_ @ whole.T, product_step(X_, whole.T)),
    )
    incoming = tuple((problem.value(p, False), step) for p, step in steps)
    problem = replace(problem, demands=(incoming[-1][0],), incoming=incoming)
    plan = search(problem, FLOPS).plan
    assert names(plan) == {"kept": 2, "matmul": 1}
    assert plan.cost(problem).flops == 2 * 3 * 64 * 96


@pytest.mark.parametrize("lasting", [{W, A}, {A, B}, {W}, set()])
def test_a_weight_that_may_change_is_not_kept(lasting: set[int]) -> None:
    problem = replace(layer(500, UPDATE), lasting=frozenset(lasting))
    plan = search(problem, FLOPS).plan
    assert names(plan) == {"addmm": 1, "matmul": 1}


def test_a_weight_with_a_tensor_as_its_factor_is_not_kept() -> None:
    """The operator takes a number; the price says what runs instead."""
    update = (B_ @ A_).scaled(Scalar(1.0, (0,)))
    problem = replace(layer(500, update), lasting=frozenset({W, A, B}))
    plan = search(problem, FLOPS).plan
    assert "kept" not in names(plan)
    assert plan.cost(problem).flops == 2 * 64 * 96 * (4 + 500)


# --- weights in four bits


def packed(tokens: int) -> Problem:
    return layer(tokens, UPDATE, packed=4)


def test_a_graph_that_multiplies_by_a_packed_weight_unpacks_nothing() -> None:
    problem = packed(3)
    assert not any(isinstance(step, Unpack) for _, step in problem.incoming)
    value, step = problem.incoming[0]
    one = usual(Work(problem, value.core, step, problem.dims))
    assert one.name == "gemm_4bit"
    extra = incoming_cost(problem)["elementwise"] - incoming_cost(layer(3, UPDATE))["elementwise"]
    assert extra == 64 * 96 // 2  # half a byte an element


def test_a_graph_that_reads_a_packed_weight_otherwise_unpacks_it() -> None:
    problem = packed(3)
    dx = product_step(leaf(X), W_)  # not M', but M
    problem = replace(problem, leaves=(LeafSpec(0, 2), *problem.leaves[1:]))
    problem = with_unpacking(replace(problem, incoming=((problem.value(X_ @ W_, False), dx),)))
    assert [step for _, step in problem.incoming] == [Unpack(), dx]


def test_few_tokens_are_multiplied_by_the_packed_weight() -> None:
    decision = decide(packed(3), FLOPS)
    assert decision.plan is not None
    assert not decision.changed
    assert names(decision.plan) == {"gemm_4bit": 1, "matmul": 2, "sum": 1}


def test_a_merged_weight_unpacks_its_base() -> None:
    problem = packed(500)
    plan = search(problem, FLOPS).plan
    assert names(plan) == {"unpack": 1, "addmm": 1, "matmul": 1}
    (unpacking,) = [op for op in plan.operations(problem) if isinstance(op, Elementwise)]
    assert unpacking.moved == 64 * 96 // 2 + 64 * 96 * 4  # read, and written


def test_a_weight_that_is_unpacked_anyway_is_multiplied_by_itself() -> None:
    """Two products with the weight: the operator would unpack it once for each."""
    problem = packed(500)
    other = leaf(4)
    problem = replace(problem, leaves=(*problem.leaves, LeafSpec(0, 1)))
    extra = problem.value(other @ W_.T, False)
    problem = replace(
        problem,
        demands=(*problem.demands, extra),
        incoming=(*problem.incoming, (extra, product_step(other, W_.T))),
    )
    plan = search(problem, FLOPS).plan
    assert names(plan) == {"unpack": 1, "addmm": 1, "matmul": 2}


def test_the_search_knows_both_ways_to_multiply_by_a_packed_weight() -> None:
    problem = packed(3)
    base = problem.value(X_ @ W_.T, False)
    ways = {way.implementation: way for way in Ways(problem, FLOPS).of(base)}
    assert ways["gemm_4bit"].reads == frozenset()
    assert ways["matmul"].reads == {problem.value(W_, False)}
    assert ways["gemm_4bit"].price > ways["matmul"].price
    work = Work(problem, base.core, ways["matmul"].step, problem.dims)
    assert [one.name for one in serving(work)] == ["gemm_4bit", "matmul"]


def test_both_phases_accumulate_or_neither_does() -> None:
    """The forward shares a product: the backward, which computes it again, keeps it apart too."""
    problem = layer(500, UPDATE)
    first, second = (problem.value(p, False) for p in (weight(UPDATE), UPDATE))
    steps: dict[Value, Step] = {}
    for backward in (False, True):
        steps[Value(first.core, backward)] = sum_step([W_, UPDATE])
        steps[Value(second.core, backward)] = product_step(B_, A_)
    assert all(
        isinstance(step, Accumulate)
        for value, step in accumulated(problem, Plan(steps)).steps.items()
    )
    other = problem.value(UPDATE @ leaf(2).T, False)
    steps[other] = product_step(B_ @ A_, A_.T)
    assert accumulated(problem, Plan(steps)).steps == steps
