"""The search against brute force, against the paper's catalogue, and its rules one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import sympy
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sympy.utilities.iterables import multiset_partitions
from torch import Tensor, nn

import runlora_fx
from runlora_fx.cost_model.objective import Objective
from runlora_fx.passes.algebra.addends import total
from runlora_fx.passes.algebra.plan import incoming_cost, incoming_operations, step_operations
from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar, leaf, normalise, polynomial
from runlora_fx.passes.algebra.problem import LeafSpec, Problem, Value
from runlora_fx.passes.algebra.steps import Keep, Product, Step, Sum, product_step
from runlora_fx.passes.algebra.words import Factor, Word
from runlora_fx.passes.search import frontiers
from runlora_fx.passes.search.decide import alternatives, decide
from runlora_fx.passes.search.frontiers import search
from runlora_fx.passes.search.ways import Ways

FLOPS = Objective("flops")

# -- brute force -------------------------------------------------------------------------------


def sum_step(parts: Sequence[Polynomial]) -> Step:
    """The sum as a step that makes its normalised value."""
    return Sum(tuple(parts)).making(total(tuple(parts)))


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
            price = int(FLOPS.total(step_operations(problem, value.core, step)))
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
    plan = search(problem, FLOPS).plan
    assert FLOPS.total(plan.operations(problem)) == brute_force(problem)


@small
@given(problems(joint=True))
def test_joint_problems_as_cheap_as_brute_force(problem: Problem) -> None:
    expected = brute_force(problem)
    if expected is None:
        with pytest.raises(ValueError, match="no plan"):
            search(problem, FLOPS)
    else:
        assert FLOPS.total(search(problem, FLOPS).plan.operations(problem)) == expected


# -- the catalogue of "Run LoRA Run" (arXiv 2312.03415), in multiply-adds ----------------------

X, W, A, B, DY, BIAS, ONES = range(7)
Shape = tuple[int, int, int, int]

GRID: list[Shape] = [
    (n, i, o, r)
    for n in (1, 16, 300, 2048, 8192)
    for i, o in ((64, 64), (256, 1024), (1024, 256), (100, 3000), (4096, 4096))
    for r in (1, 8, 64, 300)
]


def forwards(n: int, i: int, o: int, r: int) -> list[int]:
    return [
        n * i * o + n * i * r + n * r * o,  # forward1, 3: X W + (X A) B
        n * i * o + i * r * o,  # forward2, 4: X (W + A B)
    ]


def backwards(n: int, i: int, o: int, r: int) -> list[int]:
    return [
        # 1: Z = dY B'; dA = X' Z; dB = (X A)' dY; dX = dY W' + Z A'
        n * i * o + 3 * n * i * r + 2 * n * r * o,
        # 2: as 1, but dB = A' (X' dY)
        2 * n * i * o + 2 * n * i * r + n * r * o + i * r * o,
        # 3: G = X' dY; dA = G B'; dB = A' G; dX = dY W' + (dY B') A'
        2 * n * i * o + n * i * r + n * r * o + 2 * i * r * o,
        # 4: G as in 3, dX = dY (W + A B)'
        2 * n * i * o + 3 * i * r * o,
        # 5: Z and X A as in 1, dX = dY (W + A B)'
        n * i * o + 2 * n * i * r + 2 * n * r * o + i * r * o,
    ]


def lora_layer(
    shape: Shape, *, frozen_input: bool = False, trained_base: bool = False, bias: bool = False
) -> Problem:
    """``Y = X W' + 2 X A' B'`` and its gradients, as autograd computes them.

    Args:
        shape: Tokens, in, out, rank.
        frozen_input: Whether nobody asks for dX.
        trained_base: Whether dW is asked for.
        bias: Whether a bias is added.
    """
    n, i, o, r = range(4)
    leaves = (
        LeafSpec(n, i),
        LeafSpec(o, i),
        LeafSpec(r, i),
        LeafSpec(o, r),
        LeafSpec(n, o, backward=True),
        LeafSpec(4, o),
        LeafSpec(n, 4, kind="ones"),
    )
    x, w, a, b, dy, bias_row, ones = map(leaf, range(7))
    two = Scalar(2.0)
    down = product_step(x, a.T)
    base, update = x @ w.T, x @ a.T @ b.T
    parts = [base, update.scaled(two), *([ones @ bias_row] if bias else [])]
    steps: list[tuple[Polynomial, bool, Step]] = [
        (base, False, product_step(x, w.T)),
        (x @ a.T, False, down),
        (update, False, product_step(x @ a.T, b.T)),
        (polynomial(t for p in parts for t in p), False, sum_step(parts)),
        (dy @ b, True, product_step(dy, b)),
        (b.T @ dy.T @ x, True, product_step((dy @ b).T, x)),
        (dy.T @ x @ a.T, True, product_step(dy.T, x @ a.T)),
    ]
    demands = [parts[0] + parts[1], b.T @ dy.T @ x, dy.T @ x @ a.T]
    if bias:
        steps.append((ones @ bias_row, False, product_step(ones, bias_row)))
        demands[0] = demands[0] + parts[2]
    if not frozen_input:
        dx = [dy @ w, (dy @ b @ a).scaled(two)]
        steps.append((dy @ w, True, product_step(dy, w)))
        steps.append((dy @ b @ a, True, product_step(dy @ b, a)))
        steps.append((dx[0] + dx[1], True, sum_step(dx)))
        demands.append(dx[0] + dx[1])
    if trained_base:
        steps.append((dy.T @ x, True, product_step(dy.T, x)))
        demands.append(dy.T @ x)
    return Problem(
        leaves=leaves,
        dims=(*shape, 1),
        demands=tuple(Value(normalise(p).core, DY in p.leaves) for p in demands),
        incoming=tuple((Value(normalise(p).core, late), step) for p, late, step in steps),
        kept=frozenset([normalise(x @ a.T).core]),
        itemsize=4,
    )


def planned_flops(problem: Problem) -> int:
    return int(search(problem, FLOPS).plan.cost(problem).flops)


@pytest.mark.parametrize("shape", GRID)
def test_never_dearer_than_the_catalogue(shape: Shape) -> None:
    catalogue = min(forwards(*shape)) + min(backwards(*shape))
    assert planned_flops(lora_layer(shape)) <= 2 * catalogue


@pytest.mark.parametrize("shape", GRID[::3])
def test_without_dx_as_cheap_as_the_best_of_both_orders_of_the_gradients(shape: Shape) -> None:
    n, i, o, r = shape
    apart = 2 * n * r * o + 2 * n * i * r  # dA = X' (dY B'), dB = (X A)' dY; X A is kept or made
    through_g = n * i * o + 2 * i * r * o  # dA = G B', dB = A' G
    best = min(forwards(*shape)) + min(apart, through_g)
    assert planned_flops(lora_layer(shape, frozen_input=True)) <= 2 * best


@pytest.mark.parametrize("shape", GRID[::3])
def test_with_the_base_trained_its_gradient_is_shared(shape: Shape) -> None:
    n, i, o, _ = shape
    best = min(forwards(*shape)) + min(backwards(*shape)[2:4])
    assert planned_flops(lora_layer(shape, trained_base=True)) <= 2 * best
    free = planned_flops(lora_layer(shape)) + 2 * n * i * o
    assert planned_flops(lora_layer(shape, trained_base=True)) <= free


class _Lora(nn.Module):
    def __init__(self, i: int, o: int, r: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(o, i), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(r, i)), nn.Parameter(torch.randn(o, r))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.t() + 2 * (x @ self.a.t() @ self.b.t())


@pytest.mark.parametrize("shape", [(8, 32, 48, 4), (512, 32, 48, 4), (64, 32, 48, 40)])
def test_a_traced_layer_poses_the_same_problem(shape: Shape) -> None:
    n, i, o, r = shape
    torch._dynamo.reset()
    runlora_fx.joint_graph(_Lora(i, o, r), (torch.randn(n, i, requires_grad=True),))
    report = runlora_fx.last_report()
    assert report is not None
    problem = lora_layer(shape)
    assert report.flops_before == incoming_cost(problem).flops
    assert report.flops_after == planned_flops(problem)


# -- the rules, one by one ---------------------------------------------------------------------


def one_word(*sizes: int, incoming: Step | None = None) -> Problem:
    """A chain of matrices of the given sizes, ``L0 L1 ...``."""
    n = len(sizes) - 1
    p = leaf(0)
    for i in range(1, n):
        p = p @ leaf(i)
    leaves = tuple(LeafSpec(i, i + 1) for i in range(n))
    value = Value(normalise(p).core, False)
    steps = () if incoming is None else ((value, incoming),)
    return Problem(leaves, sizes, (value,), steps, frozenset(), 4)


def test_a_chain_is_multiplied_in_the_order_of_least_flops() -> None:
    # The textbook example of matrix-chain multiplication (Cormen et al., section 15.2).
    problem = one_word(30, 35, 15, 5, 10, 20, 25)
    assert planned_flops(problem) == 2 * 15125


@pytest.mark.parametrize(("tokens", "merged"), [(127, False), (129, True)])
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_the_forward_alone_breaks_even_at_io_over_i_plus_o(
    tokens: int, merged: bool, rank: int
) -> None:
    problem = lora_layer((tokens, 256, 256, rank))
    problem = replace(problem, demands=problem.demands[:1])
    plan = search(problem, FLOPS).plan
    assert isinstance(plan.steps[problem.demands[0]], Product) == merged


def test_a_tie_leaves_the_graph_as_it_came() -> None:
    problem = lora_layer((128, 256, 256, 8))
    only_forward = {problem.demands[0], *(v for v, _ in problem.incoming if not v.backward)}
    problem = replace(
        problem,
        demands=problem.demands[:1],
        incoming=tuple((v, s) for v, s in problem.incoming if v in only_forward),
    )
    decision = decide(problem, FLOPS)
    assert decision.before.flops == planned_flops(problem)
    assert not decision.changed
    assert "as it came" in decision.reason


def test_a_plan_below_the_margin_is_not_taken() -> None:
    problem = lora_layer((512, 256, 256, 8))
    plain = decide(problem, FLOPS)
    saved = 1 - plain.after.flops / plain.before.flops
    assert plain.changed
    assert decide(problem, Objective("flops", margin=saved * 0.99)).changed
    held_back = decide(problem, Objective("flops", margin=saved * 1.01))
    assert not held_back.changed
    assert "margin" in held_back.reason
    assert held_back.after == held_back.before


def test_the_decision_for_equal_layers_is_made_once() -> None:
    shape = (77, 123, 321, 5)
    before = decide.cache_info()
    assert decide(lora_layer(shape), FLOPS) is decide(lora_layer(shape), FLOPS)
    after = decide.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses + 1)


def _needs_down_in_the_backward(*, held: bool = True, kept: bool = True) -> Problem:
    """``X A'`` is asked for in the forward, ``dY' (X A')`` in the backward."""
    x, a, dy = leaf(0), leaf(1), leaf(2)
    leaves = (LeafSpec(0, 1, held=held), LeafSpec(2, 1), LeafSpec(0, 3, backward=True))
    down = normalise(x @ a.T).core
    demands = (Value(down, False), Value(normalise(dy.T @ x @ a.T).core, True))
    return Problem(leaves, (100, 50, 4, 60), demands, (), frozenset([down] if kept else []), 4)


def test_what_the_graph_keeps_is_free_in_the_backward() -> None:
    once, use = 2 * 100 * 50 * 4, 2 * 60 * 100 * 4
    plan = search(_needs_down_in_the_backward(), FLOPS).plan
    assert any(isinstance(step, Keep) for step in plan.steps.values())
    assert planned_flops(_needs_down_in_the_backward()) == once + use


def test_what_the_graph_does_not_keep_is_paid_twice() -> None:
    once, use = 2 * 100 * 50 * 4, 2 * 60 * 100 * 4
    assert planned_flops(_needs_down_in_the_backward(kept=False)) == 2 * once + use


def test_the_backward_reads_no_leaf_that_is_not_held() -> None:
    assert planned_flops(_needs_down_in_the_backward(held=False)) == planned_flops(
        _needs_down_in_the_backward()
    )
    with pytest.raises(ValueError, match="no plan"):
        search(_needs_down_in_the_backward(held=False, kept=False), FLOPS)


def test_a_value_that_two_demands_share_is_paid_once() -> None:
    x, a, b, c = map(leaf, range(4))
    leaves = (LeafSpec(0, 1), LeafSpec(1, 2), LeafSpec(2, 3), LeafSpec(2, 3))
    demands = tuple(Value(normalise(x @ a @ p).core, False) for p in (b, c))
    problem = Problem(leaves, (50, 40, 3, 30), demands, (), frozenset(), 4)
    assert planned_flops(problem) == 2 * 50 * 40 * 3 + 2 * (2 * 50 * 3 * 30)


def test_a_transposed_twin_is_the_same_value() -> None:
    x, a, b = map(leaf, range(3))
    leaves = (LeafSpec(0, 1), LeafSpec(2, 1), LeafSpec(2, 1))
    demands = tuple(Value(normalise(p).core, False) for p in (x @ a.T @ b, b.T @ a @ x.T))
    problem = Problem(leaves, (50, 40, 3), tuple(dict.fromkeys(demands)), (), frozenset(), 4)
    assert len(problem.demands) == 1


def test_a_bias_costs_no_flops() -> None:
    for shape in ((16, 256, 128, 8), (512, 256, 128, 8)):
        assert planned_flops(lora_layer(shape, bias=True)) == planned_flops(lora_layer(shape))


def test_the_first_step_can_be_asked_for() -> None:
    problem = lora_layer((16, 256, 256, 8))
    demand = problem.demands[0]
    chosen = search(problem, FLOPS).plan
    asked = product_step(leaf(X), leaf(W).T + (leaf(A).T @ leaf(B).T).scaled(Scalar(2.0)))
    forced = search(problem, FLOPS, asked).plan
    assert forced.steps[demand] == asked != chosen.steps[demand]
    assert forced.cost(problem).flops > chosen.cost(problem).flops


def test_the_alternatives_are_ranked_and_begin_with_the_choice() -> None:
    problem = lora_layer((512, 256, 256, 8))
    decision = decide(problem, FLOPS)
    prices = [FLOPS.total(a.plan.operations(problem)) for a in decision.alternatives]
    assert prices == sorted(prices)
    assert len(prices) > 1
    assert decision.plan is not None
    assert prices[0] == FLOPS.total(decision.plan.operations(problem))


def test_the_alternatives_together_are_searched_as_long_as_one_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is left out is what promised least: the choice is still among them."""
    whole = decide(lora_layer((511, 256, 256, 8)), FLOPS)
    monkeypatch.setattr(frontiers, "_EFFORT", 1)
    monkeypatch.setattr(frontiers, "_EFFORT_PER_STEP", 0)
    problem = lora_layer((513, 256, 256, 8))
    few = alternatives(problem, FLOPS)
    assert 1 <= len(few) < len(whole.alternatives)
    assert few[0].step == whole.alternatives[0].step


def test_formulas_agree_with_the_numbers_of_the_search() -> None:
    shape = (512, 256, 128, 8)
    problem = lora_layer(shape)
    symbols = sympy.symbols("N i o r one", positive=True, integer=True)
    at_hints = dict(zip(symbols, problem.dims, strict=True))
    for number, formula in (
        (incoming_cost(problem), incoming_cost(problem, symbols)),
        (
            search(problem, FLOPS).plan.cost(problem),
            search(problem, FLOPS).plan.cost(problem, symbols),
        ),
    ):
        assert number.flops == sympy.sympify(formula.flops).subs(at_hints)
        assert number.bytes == sympy.sympify(formula.bytes).subs(at_hints)
        assert number.kernels == formula.kernels


def test_a_step_that_the_graph_takes_twice_counts_once() -> None:
    # The compiler merges equal nodes, so a graph that spells a product twice pays for it once.
    problem = lora_layer((64, 256, 128, 8))
    doubled = replace(problem, incoming=problem.incoming * 2)
    assert incoming_cost(doubled) == incoming_cost(problem)


def test_the_graph_as_it_came_is_always_a_candidate() -> None:
    # No rule of the search would add a value up from these parts; the graph does.
    x, a = leaf(0), leaf(1)
    leaves = (LeafSpec(0, 1), LeafSpec(1, 2))
    core = normalise(x @ a).core
    step = Sum(((x @ a).scaled(Scalar(0.5)), (x @ a).scaled(Scalar(0.5))))
    odd = Problem(
        leaves, (5, 6, 7), (Value(core, False),), ((Value(core, False), step),), frozenset(), 4
    )
    assert planned_flops(odd) == 2 * 5 * 6 * 7
    problem = one_word(3, 4, 5, 6, incoming=product_step(leaf(0), leaf(1) @ leaf(2)))
    found = Ways(problem, FLOPS).of(problem.demands[0])
    assert product_step(leaf(0), leaf(1) @ leaf(2)) == found[0].step


def uses_of_a_layer(times: int, *, shape: Shape = (192, 64, 64, 8)) -> Problem:
    """``for _ in range(times): x = f(x W' + 2 (x A') B')``, with all gradients."""
    n, i, o, r = range(4)
    leaves = [LeafSpec(o, i), LeafSpec(r, i), LeafSpec(o, r)]
    w, a, b = map(leaf, range(3))
    two = Scalar(2.0)
    steps: list[tuple[Polynomial, bool, Step]] = []
    demands: list[Polynomial] = []
    kept, grads_a, grads_b = [], [], []
    for use in range(times):
        x, dy = leaf(3 + 2 * use), leaf(4 + 2 * use)
        leaves += [LeafSpec(n, i), LeafSpec(n, o, backward=True)]
        down, up, base = x @ a.T, x @ a.T @ b.T, x @ w.T
        dx = [dy @ w, (dy @ b @ a).scaled(two)]
        demands += [base + up.scaled(two), dx[0] + dx[1]]
        grads_a.append(b.T @ dy.T @ x)
        grads_b.append(dy.T @ x @ a.T)
        kept.append(normalise(down).core)
        steps += [
            (base, False, product_step(x, w.T)),
            (down, False, product_step(x, a.T)),
            (up, False, product_step(down, b.T)),
            (demands[-2], False, sum_step([base, up.scaled(two)])),
            (dx[0], True, product_step(dy, w)),
            (dy @ b, True, product_step(dy, b)),
            (dy @ b @ a, True, product_step(dy @ b, a)),
            (demands[-1], True, sum_step(dx)),
            (grads_a[-1], True, product_step((dy @ b).T, x)),
            (grads_b[-1], True, product_step(dy.T, down)),
        ]
    for parts in (grads_a, grads_b):
        demands.append(polynomial(t for p in parts for t in p))
        if times > 1:
            steps.append((demands[-1], True, sum_step(parts)))
    tangents = frozenset(4 + 2 * use for use in range(times))
    return Problem(
        leaves=tuple(leaves),
        dims=shape,
        demands=tuple(Value(normalise(p).core, not tangents.isdisjoint(p.leaves)) for p in demands),
        incoming=(
            *((Value(normalise(p).core, late), step) for p, late, step in steps),
            *((Value(core, True), Keep()) for core in kept),
        ),
        kept=frozenset(kept),
        itemsize=4,
    )


@pytest.mark.parametrize("objective", [FLOPS, Objective("time")])
def test_a_weight_that_is_used_often_is_planned_exactly_and_gains_for_each_use(
    objective: Objective,
) -> None:
    saved, effort = {}, {}
    for times in (1, 2, 3, 4, 6, 8, 12, 24):
        problem = uses_of_a_layer(times)
        found = search(problem, objective)
        # Sums of five and six words are split in all ways, which are many; longer ones are not.
        assert found.proof == "exact" or times == 6
        before = objective.total(incoming_operations(problem))
        saved[times] = float(before - objective.total(found.plan.operations(problem))) / times
        effort[times] = found.effort / times
    # Merged weights are shared by all uses, so that each gains more.
    gains = list(saved.values())
    assert all(more >= less * (1 - 1e-9) for less, more in itertools.pairwise(gains))
    assert effort[24] <= 2 * effort[8], "the work grows about as the number of uses does"


def shared_input_vectors() -> Problem:
    """VeRA on q and v: two layers that share A, B and the input; only the vectors train."""
    n, i, o, r = range(4)
    leaves = (
        LeafSpec(n, i, held=False),
        *(LeafSpec(o, i), LeafSpec(r, i), LeafSpec(r, r, kind="diagonal"), LeafSpec(o, r)),
        *(LeafSpec(o, o, kind="diagonal"), LeafSpec(o, i), LeafSpec(r, r, kind="diagonal")),
        LeafSpec(o, o, kind="diagonal"),
        *(LeafSpec(n, o, backward=True), LeafSpec(n, o, backward=True)),
    )
    x, q, a, b, v = (leaf(k) for k in (0, 1, 2, 4, 6))
    steps: list[tuple[Polynomial, bool, Step]] = []
    demands: list[Polynomial] = []
    dx: list[Polynomial] = []
    kept = [x @ a.T]
    for w, inner, outer, grad in ((q, 3, 5, 10), (v, 7, 8, 9)):
        d, e, dy = leaf(inner, diagonal=True), leaf(outer, diagonal=True), leaf(grad)
        down = x @ a.T
        up = down @ d @ b.T
        scaled = up @ e
        back = e @ dy.T
        kept.append(up)
        chain = a.T @ d @ b.T @ back
        demands += [x @ w.T + scaled, (dy.T @ up).diag_part, (b.T @ back @ down).diag_part]
        dx += [w.T @ dy.T, chain]
        steps += [
            (x @ w.T, False, product_step(x, w.T)),
            (down, False, product_step(x, a.T)),
            (down @ d, False, product_step(down, d)),
            (up, False, product_step(down @ d, b.T)),
            (scaled, False, product_step(up, e)),
            (demands[-3], False, sum_step([x @ w.T, scaled])),
            (back, True, product_step(e, dy.T)),
            (demands[-2], True, Product(dy.T, up).making((dy.T @ up).diag_part)),
            (b.T @ back, True, product_step(b.T, back)),
            (demands[-1], True, Product(b.T @ back, down).making((b.T @ back @ down).diag_part)),
            (d @ b.T @ back, True, product_step(d, b.T @ back)),
            (chain, True, product_step(a.T, d @ b.T @ back)),
            (w.T @ dy.T, True, product_step(w.T, dy.T)),
        ]
    demands.append(polynomial(t for p in dx for t in p))
    steps.append((demands[-1], True, sum_step(dx)))
    tangents = {9, 10}
    cores = frozenset(normalise(p).core for p in kept)
    return Problem(
        leaves=leaves,
        dims=(192, 64, 64, 8),
        demands=tuple(Value(normalise(p).core, not tangents.isdisjoint(p.leaves)) for p in demands),
        incoming=(
            *((Value(normalise(p).core, late), step) for p, late, step in steps),
            *((Value(core, True), Keep()) for core in cores),
        ),
        kept=cores,
        itemsize=4,
    )


@pytest.mark.parametrize("objective", [FLOPS, Objective("time")])
def test_layers_that_share_an_adapter_are_planned_exactly(objective: Objective) -> None:
    problem = shared_input_vectors()
    found = search(problem, objective)
    assert found.proof == "exact"
    assert found.effort < 200_000
    decision = decide(problem, objective)
    assert decision.changed
    assert "best plan found" not in decision.reason
    assert decision.after.flops < decision.before.flops


def test_a_search_without_room_says_so_and_is_never_dearer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frontiers, "_EFFORT", 0)
    monkeypatch.setattr(frontiers, "_EFFORT_PER_STEP", 0)
    problem = uses_of_a_layer(5, shape=(511, 257, 129, 7))
    for width in (1, 2, 3):
        found = search(problem, FLOPS, widths=(width,))
        assert found.proof == "best found"
        assert FLOPS.total(found.plan.operations(problem)) <= FLOPS.total(
            incoming_operations(problem)
        )
    monkeypatch.setattr(frontiers, "WIDTHS", (2,))
    decide.cache_clear()
    decision = decide(problem, FLOPS)
    decide.cache_clear()
    assert decision.proof == "best found"
    assert "not all were compared" in decision.reason


def test_a_value_that_a_sum_reads_twice_is_made_once() -> None:
    # P + Q + (P + Q)' with P = 3 X X' and Q = X Y: flattened, the sum would add four matrices.
    x, y = leaf(0), leaf(1)
    leaves = (LeafSpec(0, 0), LeafSpec(0, 0))
    half = x @ y + y @ x @ x
    p = half + half.T
    problem = Problem(leaves, (40,), (Value(normalise(p).core, False),), (), frozenset(), 4)
    found = search(problem, FLOPS)
    plan_price = FLOPS.total(found.plan.operations(problem))
    assert plan_price == brute_force(problem)


def test_no_vector_is_added_to_a_matrix() -> None:
    """``(X + X B) diag(g)`` is not ``X (diag(g) + B diag(g))``: the vector is no matrix."""
    x, b, g = leaf(0), leaf(1), leaf(2, diagonal=True)
    core = normalise((x + x @ b) @ g).core
    leaves = (LeafSpec(0, 1), LeafSpec(1, 1), LeafSpec(1, 1, kind="diagonal"))
    demand = Value(core, False)
    steps = ((demand, product_step(x + x @ b, g)),)
    problem = Problem(leaves, (1, 4), (demand,), steps, frozenset(), 8)
    factors = Value(normalise(g + b @ g).core, False)
    assert Ways(problem, FLOPS).of(demand)
    assert Ways(problem, FLOPS).of(factors) == []
