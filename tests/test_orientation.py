"""How values lie in memory is decided once: what is priced is what is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import runlora_fx
from runlora_fx.cost_model.ops import MatMul
from runlora_fx.passes.algebra.orientation import is_turned, orientations
from runlora_fx.passes.algebra.plan import Plan
from runlora_fx.passes.algebra.polynomials import Polynomial, leaf, normalise
from runlora_fx.passes.algebra.problem import LeafSpec, Problem, Value
from runlora_fx.passes.algebra.steps import Product, Step, Sum
from runlora_fx.passes.emit import apply as application

A, B, C = leaf(0), leaf(1), leaf(2)
SQUARE = tuple(LeafSpec(0, 0) for _ in range(3))


def value(p: Polynomial) -> Value:
    return Value(normalise(p).core, False)


def problem_of(
    *demands: Polynomial, shown: tuple[tuple[Polynomial, bool], ...] = (), rows: int = 8
) -> Problem:
    leaves = (LeafSpec(0, 1), LeafSpec(1, 1), LeafSpec(0, 1))
    return Problem(leaves, (rows, 8), tuple(map(value, demands)), (), frozenset(), 4, shown=shown)


@pytest.mark.parametrize("p", (A @ B, A.T @ B, A @ B.T, A @ B + C))
def test_a_transposed_operand_lies_the_other_way(p: Polynomial) -> None:
    """Also where all leaves are of one size."""
    problem = Problem(SQUARE, (8,), (value(p),), (), frozenset(), 4)
    assert is_turned(problem, p) != is_turned(problem, p.T)


def test_what_the_graph_shows_lies_as_it_is_shown() -> None:
    core = value(A @ B).core
    for turned in (False, True):
        problem = problem_of(A @ B, shown=((core, turned),))
        assert orientations(problem, {}) == {core: turned}


def test_what_only_a_sum_reads_lies_as_the_sum_does() -> None:
    total, product = value(A @ B + C), value(A @ B)
    steps: dict[Value, Step] = {
        product: Product(A, B),
        total: Sum((A @ B, C)),
    }
    problem = problem_of(A @ B + C, shown=((total.core, True),))
    lies = orientations(problem, steps)
    assert lies[total.core] and lies[product.core] != normalise(A @ B).transposed


def test_what_a_product_reads_lies_the_same_in_every_plan() -> None:
    read = A @ B
    made = value(read.T @ C)
    alone: dict[Value, Step] = {value(read): Product(A, B), made: Product(read.T, C)}
    summed = alone | {value(read + C): Sum((read, C))}
    problem = problem_of(read.T @ C, read + C, shown=((value(read + C).core, True),))
    core = value(read).core
    assert orientations(problem, alone)[core] == orientations(problem, summed)[core]


class Lora(nn.Module):
    """A layer with a square weight, where sizes decide nothing."""

    def __init__(self, width: int, rank: int, *, merges: bool) -> None:
        super().__init__()
        self.merges = merges
        self.w = nn.Parameter(torch.randn(width, width), requires_grad=False)
        self.a = nn.Parameter(torch.randn(rank, width))
        self.b = nn.Parameter(torch.randn(width, rank))

    def forward(self, x: Tensor) -> Tensor:
        if self.merges:
            return x @ (self.w + 2.0 * self.b @ self.a).t()
        return x @ self.w.t() + 2.0 * (x @ self.a.t()) @ self.b.t()


@pytest.mark.parametrize(("tokens", "merges"), ((4, True), (16, True), (300, False)))
def test_products_are_priced_in_the_layouts_that_they_are_written_in(
    tokens: int, merges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    priced: list[tuple[int, ...]] = []

    def spied(analysis: Any, plans: dict[int, Plan], *args: Any, **kwargs: Any) -> None:
        for i, plan in plans.items():
            problem = analysis.posed[i].problem
            priced.extend(op.shape for op in plan.operations(problem) if isinstance(op, MatMul))
        application.apply(analysis, plans, *args, **kwargs)

    monkeypatch.setattr("runlora_fx.passes.planning.apply", spied)
    graph = runlora_fx.joint_graph(Lora(48, 4, merges=merges), [torch.randn(tokens, 48)]).graph
    written = [
        op.shape
        for node in graph.nodes
        if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        for op in [_product(*node.args[-2:])]
    ]
    # A product that both phases compute is written once, for the partitioner to write it again.
    assert priced and set(priced) == set(written)


def _product(a: fx.Node, b: fx.Node) -> MatMul:
    left, right = a.meta["val"], b.meta["val"]
    turned = (not left.is_contiguous(), not right.is_contiguous())
    return MatMul(1, *left.shape, right.shape[1], 4, turned)
