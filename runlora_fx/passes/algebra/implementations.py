"""Implementations: how a step of a plan runs, as data.

An implementation says which steps it serves, which of their operands it reads, and which operations
it runs. The function that writes it is registered under the same name in the room ``emit``.

Example: ``1' X`` is a product with a row of ones. ``"total"`` serves it by a sum over rows. The
search prefers it to ``"matmul"``, which serves every product and costs more.

Invariant: every step is served by a usual implementation. The first of them prices the graph that
takes the step. The search chooses among all that serve it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from runlora_fx.cost_model.cost import Amount
from runlora_fx.cost_model.ops import (
    Add,
    Elementwise,
    GroupedMatMul,
    Hold,
    MatMul,
    Operation,
)
from runlora_fx.passes.algebra.orientation import is_turned
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.problem import Dims, Problem, is_broadcast
from runlora_fx.passes.algebra.steps import (
    Accumulate,
    GroupedOuter,
    GroupedProduct,
    Keep,
    Pick,
    Product,
    Scatter,
    Step,
    Sum,
    Unpack,
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
    def size(self) -> Amount:
        """What the value takes in memory [B]."""
        batch, rows, cols = self.extents
        return batch * rows * cols * self.itemsize

    @property
    def product(self) -> Product | None:
        """The step, if it is a product that makes a matrix."""
        return self.step if isinstance(self.step, Product) and not self.core.is_diag_part else None

    @property
    def inner(self) -> int:
        """The dimension that a product contracts."""
        assert isinstance(self.step, Product | Accumulate)
        return self.problem.shape(self.step.left)[2]


def _always(work: Work) -> bool:
    return True


def _operands(work: Work) -> tuple[Polynomial, ...]:
    return work.step.operands


@dataclass(frozen=True)
class Implementation:
    """One way to run a step.

    Attributes:
        name: What it is registered by, in plans and where it is written.
        step: The kind of step that it runs.
        operations: What it runs, given some work; symbolic where the sizes are. Their prices add
            up, and those that are matrix products take the time that was measured of them.
        serves: True if it can do some work.
        reads: What it reads of the step's operands.
        is_usual: True if a graph that takes the step may run it so.
    """

    name: str
    step: type[Step]
    operations: Callable[[Work], tuple[Operation, ...]]
    serves: Callable[[Work], bool] = _always
    reads: Callable[[Work], tuple[Polynomial, ...]] = _operands
    is_usual: bool = True


# -- the registry ------------------------------------------------------------------------------


def register(implementation: Implementation) -> None:
    """Add an implementation, before anything is planned: decisions are remembered.

    Raises:
        ValueError: If another one has its name.
    """
    if implementation.name in REGISTERED:
        raise ValueError(f"there is an implementation {implementation.name!r} already")
    REGISTERED[implementation.name] = implementation


def named(name: str) -> Implementation:
    """The implementation of a name."""
    return REGISTERED[name]


def serving(work: Work) -> list[Implementation]:
    """All implementations that can do some work, the one that a graph runs first."""
    found = [
        one for one in REGISTERED.values() if isinstance(work.step, one.step) and one.serves(work)
    ]
    return sorted(found, key=lambda one: not one.is_usual) if len(found) > 1 else found


def usual(work: Work) -> Implementation:
    """The implementation that a graph that takes the step runs."""
    return serving(work)[0]


# -- sums and what is kept ---------------------------------------------------------------------


def _add(work: Work) -> tuple[Operation, ...]:
    return (Add(*work.extents, len(work.step.operands), work.itemsize),)


_SUM = Implementation("sum", Sum, _add)

_KEEP = Implementation("keep", Keep, lambda work: (Hold(*work.extents, work.itemsize),))


def _accumulate(work: Work) -> tuple[Operation, ...]:
    # Every addition is priced alike: see :class:`Add`.
    return (_product(work), Add(*work.extents, 2, work.itemsize))


_ADDMM = Implementation("addmm", Accumulate, _accumulate)


def is_mergeable(problem: Problem, core: Polynomial) -> bool:
    """True if a value is ``W + s B A + ...`` of leaves that are the same tensors in every call."""
    lengths = [len(word.factors) for word in core.words]
    return (
        core.leaves <= problem.lasting
        and lengths[0] == 1
        and core.terms[0][1] == 1.0
        and all(length == 2 for length in lengths[1:])
        and not core.scalar_leaves
        and all(problem.leaves[leaf].kind == "matrix" for leaf in core.leaves)
    )


def _keeps(work: Work) -> bool:
    step = work.step
    assert isinstance(step, Accumulate)
    is_of_leaves = step.left.leaf is not None and step.right.leaf is not None
    return is_of_leaves and is_mergeable(work.problem, work.core)


#: In most calls nothing runs: the weight is the one that an earlier call merged.
_KEPT = Implementation("kept", Accumulate, lambda work: (), _keeps, is_usual=False)


# -- products ----------------------------------------------------------------------------------


def _is_diagonal(work: Work) -> bool:
    return work.core.is_diag_part


_DIAGONAL = Implementation(
    "diagonal",
    Product,
    lambda work: (Elementwise(2 * work.size * work.sizes[work.inner]),),
    _is_diagonal,
)


def _repeats(work: Work) -> bool:
    step = work.product
    return step is not None and is_broadcast(work.problem.leaves, step.left, step.right)


#: Fused into whatever reads it.
_REPEAT = Implementation("repeat", Product, lambda work: (), _repeats)


def _scales(work: Work) -> bool:
    step = work.product
    return step is not None and (step.left.is_diagonal or step.right.is_diagonal)


def _scale(work: Work) -> tuple[Operation, ...]:
    # A demand is read by something elementwise, which scales it on the way.
    is_demand = any(work.core == demand.core for demand in work.problem.demands)
    return () if is_demand else (Elementwise(2 * work.size),)


_SCALE = Implementation("scale", Product, _scale, _scales)


def _adds_up(work: Work) -> bool:
    step = work.product
    return step is not None and is_broadcast(work.problem.leaves, step.left.T, step.right.T)


_TOTAL = Implementation(
    "total",
    Product,
    lambda work: (Elementwise((work.sizes[work.inner] + 1) * work.size),),
    _adds_up,
)


def _product(work: Work) -> Operation:
    step, problem = work.step, work.problem
    assert isinstance(step, Product | Accumulate)
    b, m, n = work.extents
    if _is_by_token(work) and problem.dims[work.inner] == 1:
        return Elementwise(2 * work.size)  # a column times a row: elementwise
    turned = (is_turned(problem, step.left), is_turned(problem, step.right))
    return MatMul(b, m, work.sizes[work.inner], n, work.itemsize, turned)


def _is_by_token(work: Work) -> bool:
    """True if a batch has a matrix for each token that an index assigns."""
    batch = work.problem.shape(work.core)[0]
    return any(a.kind == "indexed" and a.tokens == batch for a in work.problem.assignments)


_MATMUL = Implementation(
    "matmul", Product, lambda work: (_product(work),), lambda work: work.product is not None
)


# -- weights that are stored in few bits -------------------------------------------------------


def _virtual(work: Work) -> Polynomial | None:
    """The operand of a product that is M', as in ``X M'``, or M, as in ``M X'``, of a virtual M."""
    step = work.product
    for p, shown in ((step.right, step.right), (step.left, step.left.T)) if step else ():
        factor = shown.leaf
        if factor is not None and factor.transposed and work.problem.leaves[factor.leaf].packed:
            return p
    return None


def _dequantise(work: Work, p: Polynomial, itemsize: int) -> Operation:
    """Read a packed weight, and write elements of some bytes each."""
    assert p.leaf is not None
    spec = work.problem.leaves[p.leaf.leaf]
    elements = work.sizes[spec.rows] * work.sizes[spec.cols]
    return Elementwise(elements * (spec.packed + 8 * itemsize) // 8)


def _multiply_packed(work: Work) -> tuple[Operation, ...]:
    virtual = _virtual(work)
    assert virtual is not None
    # It unpacks on the way: so a plan that needs the weight anyway multiplies by that.
    return (_product(work), _dequantise(work, virtual, 0))


_GEMM_4BIT = Implementation(
    "gemm_4bit",
    Product,
    _multiply_packed,
    lambda work: _virtual(work) is not None,
    lambda work: tuple(p for p in work.step.operands if p is not _virtual(work)),
)

_UNPACK = Implementation(
    "unpack", Unpack, lambda work: (_dequantise(work, work.core, work.itemsize),)
)


# -- experts -----------------------------------------------------------------------------------


def _tokens(work: Work) -> Amount:
    assert isinstance(work.step, Scatter | GroupedOuter)
    return work.sizes[work.problem.assignments[work.step.assignment].tokens]


def _grouped(work: Work) -> tuple[Operation, ...]:
    step, problem = work.step, work.problem
    assert isinstance(step, GroupedProduct)
    experts = work.sizes[problem.assignments[step.assignment].experts]
    stack = step.left if step.picked == "left" else step.right
    _, rows, cols = problem.shape(stack.T if step.picked == "left" else stack)
    turned = is_turned(problem, stack) != (step.picked == "left")
    sizes = (work.extents[0], experts, work.sizes[rows], work.sizes[cols])
    return (GroupedMatMul(*sizes, work.itemsize, turned=turned),)


_PICK = Implementation("pick", Pick, lambda work: (Elementwise(2 * work.size),))


def _scatter(work: Work) -> tuple[Operation, ...]:
    experts, rows, cols = work.extents
    return (Elementwise(2 * (_tokens(work) + experts) * rows * cols * work.itemsize),)


_SCATTER = Implementation("scatter", Scatter, _scatter)

_GROUPED = Implementation("grouped", GroupedProduct, _grouped)

_GROUPED_OUTER = Implementation(
    "grouped_outer",
    GroupedOuter,
    lambda work: (GroupedMatMul(_tokens(work), *work.extents, work.itemsize, is_outer=True),),
)

#: All implementations by name. Of those that serve a step the first usual one prices a graph that
#: takes the step. So the special products come before the one that multiplies any two matrices.
REGISTERED = {
    one.name: one
    for one in (
        *(_SUM, _ADDMM, _KEPT, _KEEP),
        *(_DIAGONAL, _REPEAT, _SCALE, _TOTAL, _GEMM_4BIT, _MATMUL, _UNPACK),
        *(_PICK, _SCATTER, _GROUPED, _GROUPED_OUTER),
    )
}
