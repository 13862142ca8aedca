"""Operations of the steps that depend on the experts of tokens, and so their costs.

Example: ``(X L)[k]`` runs one product of all tokens with the matrices of all experts, and a pick.

Invariant: an operation has the sizes of what runs, not those of the value that it makes.
"""

from __future__ import annotations

from runlora_fx.cost_model.cost import Amount
from runlora_fx.cost_model.ops import Elementwise, Gather, GroupedMatMul, MatMul, Operation
from runlora_fx.passes.algebra.orientation import is_turned
from runlora_fx.passes.algebra.steps import GroupedOuter, Scatter, StackProduct
from runlora_fx.passes.algebra.work import Work


def pick(work: Work) -> tuple[Operation, ...]:
    """``M[k]``: the matrices of the tokens are read and written."""
    return (Gather(2 * work.size),)


def scatter(work: Work) -> tuple[Operation, ...]:
    """``sum_k(P)``: what the tokens have is read and added to what the experts have."""
    experts, rows, cols = work.extents
    return (Elementwise(2 * (_tokens(work) + experts) * rows * cols * work.itemsize),)


def grouped(work: Work) -> tuple[Operation, ...]:
    """``X L[k]`` by offsets: one operator, which reads all matrices."""
    experts, rows, cols, turned = _stack(work)
    return (GroupedMatMul(work.extents[0], experts, rows, cols, work.itemsize, turned=turned),)


def grouped_outer(work: Work) -> tuple[Operation, ...]:
    """``sum_k(X' dY)`` by offsets: one operator, which writes all matrices."""
    return (GroupedMatMul(_tokens(work), *work.extents, work.itemsize, is_outer=True),)


def with_all(work: Work) -> tuple[Operation, ...]:
    """``(X L)[k]``: a product whose columns are those of all experts, and the pick of each token's.

    No matrix is written for a token. In exchange the product computes the columns of all experts.
    """
    step = work.step
    assert isinstance(step, StackProduct)
    experts, inner, cols, turned = _stack(work)
    tokens, rows, columns = work.extents
    vectors = tokens * (columns if step.picked == "left" else rows)
    factor = step.right.T if step.picked == "left" else step.left
    layouts = (is_turned(work.problem, factor), True)
    product = MatMul(1, vectors, inner, experts * cols, work.itemsize, layouts)
    picked = Elementwise(2 * work.size)
    if turned:
        return (product, picked)
    # All matrices are one matrix only if the inner dimension is the last one in memory.
    return (product, picked, Elementwise(2 * experts * inner * cols * work.itemsize))


def _tokens(work: Work) -> Amount:
    assert isinstance(work.step, Scatter | GroupedOuter)
    return work.sizes[work.problem.assignments[work.step.assignment].tokens]


def _stack(work: Work) -> tuple[Amount, Amount, Amount, bool]:
    """The sizes of the stack by which rows are multiplied, and if it is stored transposed."""
    step, problem = work.step, work.problem
    assert isinstance(step, StackProduct)
    experts = work.sizes[problem.assignments[step.assignment].experts]
    stack = step.left if step.picked == "left" else step.right
    _, rows, cols = problem.shape(stack.T if step.picked == "left" else stack)
    turned = is_turned(problem, stack) != (step.picked == "left")
    return experts, work.sizes[rows], work.sizes[cols], turned
