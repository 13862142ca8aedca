"""Experts as algebra: the laws of picks and scatters, and the search over them.

Every law and every step is evaluated on dense matrices in fp64, with a random index or offsets; the
plans are compared with brute force.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sympy.utilities.iterables import multiset_partitions
from test_search import product_splits
from torch import Tensor

from runlora_fx.cost_model.objective import Objective
from runlora_fx.passes.algebra.assignments import Assignment, Picked, picking, unpicked
from runlora_fx.passes.algebra.factorise import factorisations
from runlora_fx.passes.algebra.plan import Plan, step_operations
from runlora_fx.passes.algebra.polynomials import (
    Polynomial,
    Scalar,
    leaf,
    normalise,
    polynomial,
    substitute,
)
from runlora_fx.passes.algebra.posed import PosedProblem
from runlora_fx.passes.algebra.problem import LeafSpec, Problem, Value
from runlora_fx.passes.algebra.steps import (
    GroupedOuter,
    GroupedProduct,
    Keep,
    Pick,
    Product,
    Scatter,
    Step,
    Sum,
)
from runlora_fx.passes.algebra.words import Factor, Word
from runlora_fx.passes.search.decide import decide
from runlora_fx.passes.search.frontiers import search
from runlora_fx.passes.search.ranges import Varying, ranges
from runlora_fx.passes.search.ways import Ways
from runlora_fx.report.describe.notation import Names, algebra

FLOPS = Objective("flops")

# A layer of experts: X (a row for each token), W, L, R of all experts, W[k], L[k], R[k], dY.
X, W, L, R, PW, PL, PR, DY = range(8)
ONE_ROW, TOKENS, EXPERTS, IN, OUT, RANK = range(6)
K = 0


def expert_layer(
    dims: tuple[int, int, int, int, int],
    kind: str = "grouped",
    multiple: int = 1,
    demands: tuple[str, ...] = ("Y",),
) -> Problem:
    """``Y = X (W + 2 L R)[k]`` and its gradients, as autograd computes them.

    Args:
        dims: Tokens, experts, in, out, rank.
        kind: Of the assignment.
        multiple: Of the widths of grouped products.
        demands: Some of Y, dX, dL, dR.
    """
    leaves = (
        LeafSpec(ONE_ROW, IN, TOKENS),
        LeafSpec(IN, OUT, EXPERTS),
        LeafSpec(IN, RANK, EXPERTS),
        LeafSpec(RANK, OUT, EXPERTS),
        LeafSpec(IN, OUT, TOKENS, picked=Picked(W, K)),
        LeafSpec(IN, RANK, TOKENS, picked=Picked(L, K)),
        LeafSpec(RANK, OUT, TOKENS, picked=Picked(R, K)),
        LeafSpec(ONE_ROW, OUT, TOKENS, backward=True),
    )
    x, w, left, right, pw, pl, pr, dy = map(leaf, range(8))
    two = Scalar(2.0)
    low = left @ right
    merged, picked = w + low.scaled(two), pw + (pl @ pr).scaled(two)
    stack = (x.T @ dy).scattered(K)
    made: list[tuple[str, Polynomial, bool, Step]] = [
        ("", low, False, Product(left, right)),
        ("", merged, False, Sum((w, low.scaled(two)))),
    ]
    if kind == "indexed":
        made += [
            ("", picked, False, Pick(merged, K)),
            ("Y", x @ picked, False, Product(x, picked)),
            ("dX", dy @ picked.T, True, Product(dy, picked.T)),
            ("", x.T @ dy, True, Product(x.T, dy)),
            ("", stack, True, Scatter(x.T @ dy, K)),
        ]
    else:
        made += [
            ("Y", x @ picked, False, GroupedProduct(x, merged, K, "right")),
            ("dX", dy @ picked.T, True, GroupedProduct(dy, merged.T, K, "right")),
            ("", stack, True, GroupedOuter(x.T, dy, K)),
        ]
    made += [
        ("dL", stack @ pr.T, True, Product(stack, right.T)),
        ("dR", pl.T @ stack, True, Product(left.T, stack)),
    ]
    incoming = tuple((Value(normalise(p).core, late), step.making(p)) for _, p, late, step in made)
    wanted = {name: Value(normalise(p).core, late) for name, p, late, _ in made if name}
    kept = frozenset({normalise(merged).core, normalise(picked).core})
    problem = Problem(
        leaves=leaves,
        dims=(1, *dims),
        demands=tuple(wanted[name] for name in demands),
        incoming=incoming,
        kept=kept,
        itemsize=4,
        assignments=(Assignment(kind, TOKENS, EXPERTS, multiple),),  # type: ignore[arg-type]
    )
    needed = _needed(problem)
    return replace(problem, incoming=tuple(s for s in incoming if s[0].core in needed))


def _needed(problem: Problem) -> set[Polynomial]:
    """The values that the incoming graph makes on its way to the demands."""
    steps = {value.core: step for value, step in problem.incoming}
    found: set[Polynomial] = set()
    pending = [demand.core for demand in problem.demands]
    while pending:
        core = pending.pop()
        if core in steps and core not in found:
            found.add(core)
            pending += [normalise(p).core for p in steps[core].operands]
    return found


# -- evaluation on dense matrices ----------------------------------------------------------------


@dataclass
class Dense:
    """Random matrices for the leaves of a problem, and what polynomials and steps are of them."""

    problem: Problem
    seed: int = 0

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        (assignment,), dims = self.problem.assignments, self.problem.dims
        experts, tokens = dims[assignment.experts], dims[assignment.tokens]
        self.k = torch.randint(experts, (tokens,), generator=random)
        if assignment.kind == "grouped":  # some experts have no rows
            self.k = self.k.sort().values
        self.experts = experts
        self.leaves = [
            torch.zeros(0)
            if spec.picked
            else torch.randn(
                dims[spec.batch or 0],
                dims[spec.rows],
                dims[spec.cols],
                generator=random,
                dtype=torch.float64,
            )
            for spec in self.problem.leaves
        ]
        for i, spec in enumerate(self.problem.leaves):
            if spec.picked is not None:
                self.leaves[i] = self.leaves[spec.picked.base][self.k]

    def scatter(self, per_token: Tensor) -> Tensor:
        """The sums over each expert's tokens."""
        zeros = torch.zeros(self.experts, *per_token.shape[1:], dtype=per_token.dtype)
        return zeros.index_add(0, self.k, per_token)

    def value(self, p: Polynomial) -> Tensor:
        """What a polynomial is."""
        return sum((c * self.word(word) for word, c in p.terms), torch.zeros(()))

    def word(self, word: Word) -> Tensor:
        """What a word is."""
        product = reduce(torch.matmul, map(self.factor, word.factors))
        return self.scatter(product) if word.scattered else product

    def factor(self, factor: Factor) -> Tensor:
        """What a factor is."""
        matrix = self.leaves[factor.leaf]
        return matrix.mT if factor.transposed else matrix

    def made(self, step: Step) -> Tensor:
        """What a step makes."""
        operands = [self.value(p) for p in step.operands]
        match step:
            case Sum():
                return torch.stack(operands).sum(0)
            case Pick():
                return operands[0][self.k]
            case Scatter():
                return self.scatter(operands[0])
            case GroupedProduct(picked="left"):
                return operands[0][self.k] @ operands[1]
            case GroupedProduct():
                return operands[0] @ operands[1][self.k]
            case GroupedOuter():
                return self.scatter(operands[0] @ operands[1])
        return operands[0] @ operands[1]


DIMS = (7, 3, 4, 5, 2)
kinds = pytest.mark.parametrize("kind", ["indexed", "grouped"])
ALL = ("Y", "dX", "dL", "dR")


@kinds
def test_laws_of_picks_and_scatters(kind: str) -> None:
    problem = expert_layer(DIMS, kind, demands=ALL)
    dense = Dense(problem)
    x, w, left, right, pw, pl, pr, dy = map(leaf, range(8))
    picked = pw + (pl @ pr).scaled(Scalar(2.0))
    whole = unpicked(problem.leaves, picked)
    assert whole == w + (left @ right).scaled(Scalar(2.0))
    torch.testing.assert_close(dense.value(picked), dense.value(whole)[dense.k])
    torch.testing.assert_close(dense.value(picked.T), dense.value(whole).mT[dense.k])
    stack = (x.T @ dy).scattered(K)
    torch.testing.assert_close(dense.value(stack @ pr.T), dense.value(stack) @ dense.value(right.T))
    torch.testing.assert_close(dense.value(pl.T @ stack), dense.value(left.T) @ dense.value(stack))
    torch.testing.assert_close(dense.value(stack.T), dense.value(stack).mT)
    both = pl.T @ stack @ pr.T
    expected = dense.value(left.T) @ dense.value(stack) @ dense.value(right.T)
    torch.testing.assert_close(dense.value(both), expected)


def test_markers_are_kept_apart() -> None:
    x, dy = leaf(X), leaf(DY)
    plain, stack = x.T @ dy, (x.T @ dy).scattered(K)
    assert plain != stack
    assert stack.unscattered == plain
    assert len(plain + stack) == 2
    assert (plain + stack).is_partly_scattered
    assert list(factorisations(plain + stack)) == []
    assert leaf(W).scattered(K).leaf is None
    assert substitute(stack, {X: 3, DY: 4}, {}, {K: 5}).scattering == 5
    with pytest.raises(ValueError, match="scattered"):
        stack @ stack
    with pytest.raises(ValueError, match="scattered"):
        stack.scattered(K)


@kinds
@pytest.mark.parametrize("wanted", [("Y", "dX"), ("dL",), ("dR",), ("Y", "dL", "dR")])
def test_every_step_makes_its_value(kind: str, wanted: tuple[str, ...]) -> None:
    problem = expert_layer(DIMS, kind, demands=wanted)
    dense, ways = Dense(problem), Ways(problem, FLOPS)
    seen, pending = set(problem.demands), list(problem.demands)
    kinds_of_steps = set()
    while pending:
        value = pending.pop()
        for step, _, _, operands in ways.of(value):
            kinds_of_steps.add(type(step))
            if not isinstance(step, Keep):
                torch.testing.assert_close(dense.made(step), dense.value(value.core))
            pending += operands - seen
            seen |= operands
    assert Product in kinds_of_steps
    assert (Pick if kind == "indexed" else GroupedProduct) in kinds_of_steps


@kinds
def test_a_plan_is_the_same_in_the_numbers_of_the_graph(kind: str) -> None:
    """Other leaf numbers sort words otherwise, and turn values."""
    problem = expert_layer(DIMS, kind, demands=ALL)
    order = (7, 3, 6, 2, 5, 1, 4, 0)
    graph = PosedProblem(problem, problem.dims, order, (), (K,))
    specs = [problem.leaves[order.index(i)] for i in range(len(order))]
    specs = [
        replace(s, picked=Picked(order[s.picked.base], K)) if s.picked is not None else s
        for s in specs
    ]
    dense = Dense(replace(problem, leaves=tuple(specs)))
    plan = search(problem, FLOPS).plan
    for value, step in graph.in_graph(plan).steps.items():
        assert normalise(value.core).core == value.core
        if not isinstance(step, Keep):
            torch.testing.assert_close(dense.made(step), dense.value(value.core))


# -- brute force ---------------------------------------------------------------------------------


def oracle_ways(problem: Problem, value: Value) -> Iterator[Step]:
    """Every step towards a value, from its definition."""
    core, (assignment,) = value.core, problem.assignments
    yield from (step for made, step in problem.incoming if made == value)
    if value.backward and core in problem.kept:
        yield Keep()
    for parts in multiset_partitions(list(core.terms)):
        if len(parts) > 1:
            yield Sum(tuple(polynomial(part) for part in parts))
    is_grouped, dims = assignment.kind == "grouped", problem.dims

    def all_picked(p: Polynomial) -> bool:
        return picking(problem.leaves, p) is not None

    def whole(p: Polynomial) -> Polynomial:
        return unpicked(problem.leaves, p)

    def aligned(*sizes: int) -> bool:
        return all(dims[d] % assignment.multiple == 0 for d in sizes)

    marked = {word.scattered for word in core.words}
    if marked == {(K,)}:
        inner = core.unscattered
        if not is_grouped:
            yield Scatter(inner, K)
        for product in product_splits(inner):
            left, right = product.left, product.right
            if all_picked(right):
                yield Product(left.scattered(K), whole(right))
            if all_picked(left):
                yield Product(whole(left), right.scattered(K))
            _, m, one = problem.shape(left)
            n = problem.shape(right)[2]
            if is_grouped and one == ONE_ROW and aligned(m, n):
                yield GroupedOuter(left, right, K)
        return
    assert marked == {()}
    if all_picked(core) and not is_grouped:
        yield Pick(whole(core), K)
    for product in product_splits(core):
        left, right = product.left, product.right
        if not is_grouped or not (all_picked(left) or all_picked(right)):
            yield product
            continue
        _, m, inside = problem.shape(left)
        n = problem.shape(right)[2]
        if all_picked(left) and all_picked(right):
            continue
        if all_picked(right) and m == ONE_ROW and aligned(inside, n):
            yield GroupedProduct(left, whole(right), K, "right")
        if all_picked(left) and n == ONE_ROW and aligned(m, inside):
            yield GroupedProduct(whole(left), right, K, "left")


def brute_force(problem: Problem) -> int | None:
    """The price of the cheapest of all plans, each of them tried; None if there is none."""
    best: int | None = None
    known: dict[Value, list[tuple[int, frozenset[Value]]]] = {}

    def is_given(value: Value) -> bool:
        factor = value.core.leaf
        return factor is not None and problem.leaves[factor.leaf].picked is None

    def choices(value: Value) -> list[tuple[int, frozenset[Value]]]:
        if value not in known:
            known[value] = []
            for step in dict.fromkeys(oracle_ways(problem, value)):
                read = {normalise(p).core for p in step.operands}
                below = {
                    Value(
                        core, value.backward or any(problem.leaves[i].backward for i in core.leaves)
                    )
                    for core in read
                }
                if isinstance(step, Keep):
                    below = {Value(value.core, False)}
                price = int(FLOPS.total(step_operations(problem, value.core, step)))
                known[value].append((price, frozenset(v for v in below if not is_given(v))))
            known[value].sort(key=lambda choice: choice[0])
        return known[value]

    def visit(pending: frozenset[Value], made: frozenset[Value], paid: int) -> None:
        nonlocal best
        if best is not None and paid >= best:
            return
        if not pending:
            best = paid
            return
        value = max(pending, key=lambda v: (v.core.size, v.backward, v.core.terms))
        made |= {value}
        for price, below in choices(value):
            if not below & made:
                visit((pending | below) - {value}, made, paid + price)

    visit(frozenset(problem.demands), frozenset(), 0)
    return best


@settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    kind=st.sampled_from(["indexed", "grouped"]),
    dims=st.tuples(*[st.sampled_from([2, 4, 8, 24, 64])] * 5),
    multiple=st.sampled_from([1, 4]),
    demands=st.sampled_from([("Y",), ("dX",), ("dL",), ("dR",), ("Y", "dX"), ("dX", "dL")]),
)
def test_as_cheap_as_brute_force(
    kind: str, dims: tuple[int, int, int, int, int], multiple: int, demands: tuple[str, ...]
) -> None:
    problem = expert_layer(dims, kind, multiple, demands)
    assert FLOPS.total(search(problem, FLOPS).plan.operations(problem)) == brute_force(problem)


# -- what it decides -----------------------------------------------------------------------------


def steps_of(plan: Plan | None) -> set[type]:
    assert plan is not None
    return {type(step) for step in plan.steps.values()}


def merges(plan: Plan | None) -> bool:
    """Whether the stack of all experts is merged."""
    assert plan is not None
    return any({W, L} <= value.core.leaves for value in plan.steps)


@pytest.mark.parametrize(("tokens", "merged"), [(8, False), (170, False), (171, True)])
@kinds
def test_few_tokens_are_multiplied_by_the_factors(tokens: int, merged: bool, kind: str) -> None:
    """Up to E i o / (i + o) tokens: 4 * 64 * 128 / 192 is 170.67."""
    problem = expert_layer((tokens, 4, 64, 128, 8), kind)
    decision = decide(problem, FLOPS)
    assert merges(decision.plan) == merged
    assert decision.changed == (not merged)


def test_break_even_is_a_range_like_any_other() -> None:
    problem = expert_layer((16, 4, 64, 128, 8))
    few, many = ranges({Varying.of(problem, frozenset([TOKENS]), FLOPS): 1})
    assert many.low == 171
    assert few.high == 171


@kinds
@pytest.mark.parametrize("tokens", [16, 640])
def test_training_makes_no_gradient_of_the_stack(kind: str, tokens: int) -> None:
    """Many tokens merge in the forward all the same."""
    problem = expert_layer((tokens, 4, 64, 128, 8), kind, demands=ALL)
    plan = decide(problem, FLOPS).plan
    assert plan is not None
    stack = normalise((leaf(X).T @ leaf(DY)).scattered(K)).core
    is_made = any(value.core == stack for value in plan.steps)
    # An outer product by index is elementwise, and counts no FLOPs.
    assert is_made == (kind == "indexed" and tokens == 640)
    assert merges(plan) == (tokens == 640)


def test_an_unaligned_rank_keeps_the_stack_and_says_why() -> None:
    decision = decide(expert_layer((16, 4, 64, 128, 4), multiple=8), FLOPS)
    assert not decision.changed
    assert decision.reason.endswith("(grouped products take widths that are multiples of 8, not 4)")
    assert decide(expert_layer((16, 4, 64, 128, 8), multiple=8), FLOPS).changed


@kinds
def test_strict_numerics_merge_as_the_model_does(kind: str) -> None:
    strict = replace(FLOPS, adds_rounding=False)
    assert not decide(expert_layer((16, 4, 64, 128, 8), kind), strict).changed


def test_costs_are_those_of_the_tokens() -> None:
    problem = expert_layer((16, 4, 64, 128, 8), demands=("Y", "dR"))
    costs = {
        type(step): operation.cost
        for value, step in problem.incoming
        for operation in step_operations(problem, value.core, step)
    }
    product, outer = costs[GroupedProduct], costs[GroupedOuter]
    assert product.flops == outer.flops == 2 * 16 * 64 * 128
    assert product["read"] == 4 * (16 * 64 + 4 * 64 * 128)
    assert product["written"] == 4 * 16 * 128
    assert outer["read"] == 4 * 16 * (64 + 128)
    assert outer["written"] == 4 * 4 * 64 * 128


@kinds
def test_plans_are_printed_with_picks_and_sums(kind: str) -> None:
    problem = expert_layer((16, 4, 64, 128, 8), kind, demands=("Y", "dR"))
    names = Names(problem)
    scalars = {demand.core: Scalar() for demand in problem.demands}
    came = Plan(dict(reversed(problem.incoming)))
    assert (
        algebra(problem, names, scalars, came)
        == """\
Y = X (W + 2 A B)[k]
dB = A' sum_k(X' dY)"""
    )
    assert (
        algebra(problem, names, scalars, search(problem, FLOPS).plan)
        == """\
Z = X A[k]   (recomputed in the backward)
Y = X W[k] + 2 Z B[k]
dB = sum_k(Z' dY)"""
    )
    assert [str(symbol) for symbol in names.symbols] == ["1", "N", "E", "i", "o", "r"]
