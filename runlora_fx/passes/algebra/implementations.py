"""Implementations: how a step of a plan runs, as data.

An implementation says which steps it serves, what it costs, and as which measurement its time is
stored. What writes it is registered under the same name in the room ``emit``.

Example: ``1' X`` is a product with a row of ones; ``"total"`` serves it, a sum over rows.

Invariant: every step is served by a usual implementation. The first of them prices the graph that
takes the step. The search takes the cheapest of all that serve it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from runlora_fx.cost_model.cost import Amount
from runlora_fx.cost_model.ops import (
    Add,
    Gather,
    GemmShape,
    GroupedMatMul,
    Hold,
    MatMul,
    Operation,
    RowDots,
    ScatterAdd,
    Stretch,
    Total,
)
from runlora_fx.passes.algebra.orientation import is_turned
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.problem import Dims, Problem, is_broadcast
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


@dataclass(frozen=True)
class Work:
    """What an implementation is asked to do.

    Attributes:
        problem: The problem.
        core: The value that is made.
        step: The step that makes it.
        sizes: The dimensions [elements]: integers, or expressions where a cost is symbolic.
    """

    problem: Problem
    core: Polynomial
    step: Step
    sizes: Dims

    @cached_property
    def extents(self) -> tuple[Amount, Amount, Amount]:
        """Batch, rows and columns of the value; a vector has one column."""
        b, m, n = self.problem.shape(self.core)
        batch = 1 if b is None else self.sizes[b]
        return batch, self.sizes[m], 1 if self.core.is_diag_part else self.sizes[n]

    @property
    def itemsize(self) -> int:
        """Element width [B]."""
        return self.problem.itemsize

    @property
    def product(self) -> Product | None:
        """The step, if it is a product that makes a matrix."""
        return self.step if isinstance(self.step, Product) and not self.core.is_diag_part else None

    @property
    def inner(self) -> int:
        """The dimension that a product contracts."""
        assert isinstance(self.step, Product)
        return self.problem.shape(self.step.left)[2]


def _unmeasured(operation: Operation) -> GemmShape | None:
    """An operation that is priced by the bytes it moves."""
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run a step.

    Attributes:
        name: What it is registered by, in plans and where it is written.
        serves: Whether it can do some work.
        operation: What it runs then; None if nothing. Symbolic where the sizes are.
        measured_as: The measurement that times an operation of it; None if none is taken.
        is_usual: Whether a graph that takes the step is taken to run it so.
    """

    name: str
    serves: Callable[[Work], bool]
    operation: Callable[[Work], Operation | None]
    measured_as: Callable[[Operation], GemmShape | None] = _unmeasured
    is_usual: bool = True


# -- the registry ------------------------------------------------------------------------------


def registered() -> tuple[Implementation, ...]:
    """All implementations; of those that serve a step the first usual one prices a graph."""
    return tuple(_REGISTERED.values())


def register(implementation: Implementation) -> None:
    """Add an implementation, before anything is planned: decisions are remembered.

    Raises:
        ValueError: If another one has its name.
    """
    if implementation.name in _REGISTERED:
        raise ValueError(f"there is an implementation {implementation.name!r} already")
    _REGISTERED[implementation.name] = implementation


@contextmanager
def registering(implementation: Implementation) -> Iterator[None]:
    """A context in which there is one implementation more."""
    register(implementation)
    try:
        yield
    finally:
        del _REGISTERED[implementation.name]


def named(name: str) -> Implementation:
    """The implementation of a name."""
    return _REGISTERED[name]


def serving(work: Work) -> list[Implementation]:
    """All implementations that can do some work, the one that a graph runs first."""
    found = [one for one in _REGISTERED.values() if one.serves(work)]
    return sorted(found, key=lambda one: not one.is_usual) if len(found) > 1 else found


def usual(work: Work) -> Implementation:
    """The implementation that a graph that takes the step runs."""
    return next(one for one in _REGISTERED.values() if one.is_usual and one.serves(work))


def operation_of(implementation: Implementation, work: Work) -> Operation | None:
    """What an implementation runs; nothing where the value is kept from call to call."""
    return None if work.core.leaves <= work.problem.lasting else implementation.operation(work)


# -- sums and what is kept ---------------------------------------------------------------------


def _add(work: Work) -> Operation:
    assert isinstance(work.step, Sum)
    return Add(*work.extents, len(work.step.parts), work.itemsize)


_SUM = Implementation("sum", lambda work: isinstance(work.step, Sum), _add)

_KEEP = Implementation(
    "keep",
    lambda work: isinstance(work.step, Keep),
    lambda work: Hold(*work.extents, work.itemsize),
)


# -- products ----------------------------------------------------------------------------------


def _is_diagonal(work: Work) -> bool:
    return isinstance(work.step, Product) and work.core.is_diag_part


_DIAGONAL = Implementation(
    "diagonal",
    _is_diagonal,
    lambda work: RowDots(work.extents[1], work.sizes[work.inner], work.itemsize),
)


def _repeats(work: Work) -> bool:
    step = work.product
    return step is not None and is_broadcast(work.problem.leaves, step.left, step.right)


#: Fused into whatever reads it.
_REPEAT = Implementation("repeat", _repeats, lambda work: None)


def _scales(work: Work) -> bool:
    step = work.product
    return step is not None and (step.left.is_diagonal or step.right.is_diagonal)


def _scale(work: Work) -> Operation | None:
    # A demand is read by something elementwise, which scales it on the way.
    is_demand = any(work.core == demand.core for demand in work.problem.demands)
    return None if is_demand else Stretch(*work.extents, work.itemsize)


_SCALE = Implementation("scale", _scales, _scale)


def _adds_up(work: Work) -> bool:
    step = work.product
    return step is not None and is_broadcast(work.problem.leaves, step.left.T, step.right.T)


def _multiply(work: Work) -> Operation:
    step, problem = work.product, work.problem
    assert step is not None
    b, m, n = work.extents
    if _is_by_token(work) and problem.dims[work.inner] == 1:
        return Stretch(b, m, n, work.itemsize)  # a column times a row: elementwise
    turned = (is_turned(problem, step.left), is_turned(problem, step.right))
    return MatMul(b, m, work.sizes[work.inner], n, work.itemsize, turned)


def _is_by_token(work: Work) -> bool:
    """Whether a batch has a matrix for each token that an index assigns."""
    batch = work.problem.shape(work.core)[0]
    return any(a.kind == "indexed" and a.tokens == batch for a in work.problem.assignments)


def _shape(operation: Operation) -> GemmShape | None:
    return operation.shape if isinstance(operation, MatMul) else None


def _total(work: Work) -> Operation:
    b, m, n = work.extents
    return Total(b, work.sizes[work.inner], m * n, work.itemsize)  # one of m and n is 1


_TOTAL = Implementation("total", _adds_up, _total)

_MATMUL = Implementation("matmul", lambda work: work.product is not None, _multiply, _shape)


# -- experts -----------------------------------------------------------------------------------


def _scatter(work: Work) -> Operation:
    assert isinstance(work.step, Scatter)
    tokens = work.sizes[work.problem.assignments[work.step.assignment].tokens]
    return ScatterAdd(tokens, *work.extents, work.itemsize)


def _grouped(work: Work) -> Operation:
    step, problem = work.step, work.problem
    assert isinstance(step, GroupedProduct)
    experts = work.sizes[problem.assignments[step.assignment].experts]
    stack = step.left if step.picked == "left" else step.right
    _, rows, cols = problem.shape(stack.T if step.picked == "left" else stack)
    turned = is_turned(problem, stack) != (step.picked == "left")
    return GroupedMatMul(
        work.extents[0], experts, work.sizes[rows], work.sizes[cols], work.itemsize, turned=turned
    )


def _grouped_outer(work: Work) -> Operation:
    assert isinstance(work.step, GroupedOuter)
    tokens = work.sizes[work.problem.assignments[work.step.assignment].tokens]
    return GroupedMatMul(tokens, *work.extents, work.itemsize, is_outer=True)


_PICK = Implementation(
    "pick",
    lambda work: isinstance(work.step, Pick),
    lambda work: Gather(*work.extents, work.itemsize),
)

_SCATTER = Implementation("scatter", lambda work: isinstance(work.step, Scatter), _scatter)

_GROUPED = Implementation("grouped", lambda work: isinstance(work.step, GroupedProduct), _grouped)

_GROUPED_OUTER = Implementation(
    "grouped_outer", lambda work: isinstance(work.step, GroupedOuter), _grouped_outer
)

#: By name. Of the products the special ones come before the one that multiplies any two matrices.
_REGISTERED = {
    one.name: one
    for one in (
        *(_SUM, _KEEP, _DIAGONAL, _REPEAT, _SCALE, _TOTAL, _MATMUL),
        *(_PICK, _SCATTER, _GROUPED, _GROUPED_OUTER),
    )
}
