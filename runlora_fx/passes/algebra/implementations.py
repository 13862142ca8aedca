"""Implementations: how a step of a plan runs, as data.

An implementation says which steps it serves, which of their operands it reads, and which operations
it runs. The function that writes it is registered under the same name in the room ``emit``.

Example: ``1' X`` is a product with a row of ones. ``"total"`` runs it as a sum over rows. The
search prefers it to ``"matmul"``, which runs every product and costs more.

Invariant: every step has a usual implementation, and the first usual one prices an incoming graph
that takes the step. The search chooses among all implementations that serve the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from runlora_fx.cost_model.cost import Amount
from runlora_fx.cost_model.ops import Add, Convolution, Elementwise, Hold, MatMul, Merge, Operation
from runlora_fx.passes.algebra import expert_operations as experts
from runlora_fx.passes.algebra.images import are_images, is_convolution, patch_size
from runlora_fx.passes.algebra.orientation import is_turned
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.problem import Problem, is_broadcast
from runlora_fx.passes.algebra.steps import (
    Accumulate,
    GroupedOuter,
    GroupedProduct,
    Keep,
    Pick,
    Product,
    ProductWithAll,
    Scatter,
    Step,
    Sum,
    Unpack,
)
from runlora_fx.passes.algebra.work import Work


def _always(work: Work) -> bool:
    return True


def _operands(work: Work) -> tuple[Polynomial, ...]:
    return work.step.operands


@dataclass(frozen=True)
class Implementation:
    """One way to run a step.

    Attributes:
        name: Its name in plans and in the registry of ``emit``.
        step: The kind of step that it runs.
        operations: The operations that it runs. The price of the step is the sum of their prices.
        serves: True if it can run a step.
        reads: The operands of the step that it reads.
        is_usual: True if ordinary graphs run the step in this way.
        needs_times: True if it is offered only where the device has times of all its operations.
        spares_picks: True if it is offered only where picking matrices takes time.
    """

    name: str
    step: type[Step]
    operations: Callable[[Work], tuple[Operation, ...]]
    serves: Callable[[Work], bool] = _always
    reads: Callable[[Work], tuple[Polynomial, ...]] = _operands
    is_usual: bool = True
    needs_times: bool = False
    spares_picks: bool = False


# -- the registry ------------------------------------------------------------------------------


def register(implementation: Implementation) -> None:
    """Add an implementation. Call it before anything is planned, because decisions are cached.

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
    """All implementations that can run a step, usual ones first."""
    found = [
        one for one in REGISTERED.values() if isinstance(work.step, one.step) and one.serves(work)
    ]
    return sorted(found, key=lambda one: not one.is_usual) if len(found) > 1 else found


def usual(work: Work) -> Implementation:
    """The implementation by which an ordinary graph runs a step."""
    return serving(work)[0]


# -- sums and saved values ---------------------------------------------------------------------


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
    return core.leaves <= problem.lasting and is_merge(problem, core)


def is_merge(problem: Problem, core: Polynomial) -> bool:
    """True if a value is ``W + s B A + ...`` of leaves."""
    lengths = [len(word.factors) for word in core.words]
    return (
        lengths[0] == 1
        and core.terms[0][1] == 1.0
        and all(length == 2 for length in lengths[1:])
        and not core.scalar_leaves
        and all(problem.leaves[leaf].kind == "matrix" for leaf in core.leaves)
        and not are_images(problem.leaves, core)
    )


def _keeps(work: Work) -> bool:
    step = work.step
    assert isinstance(step, Accumulate)
    is_of_leaves = step.left.leaf is not None and step.right.leaf is not None
    return is_of_leaves and is_mergeable(work.problem, work.core)


#: It costs nothing: in most calls the weight is the one that an earlier call merged.
_KEPT = Implementation("kept", Accumulate, lambda work: (), _keeps, is_usual=False)


def _merges(work: Work) -> bool:
    step = work.step
    assert isinstance(step, Accumulate)
    is_of_leaves = all(p.leaf is not None for p in step.operands)
    is_matrix = work.problem.shape(work.core)[0] is None
    return is_of_leaves and is_matrix and is_merge(work.problem, work.core)


def _merge(work: Work) -> tuple[Operation, ...]:
    _, rows, cols = work.extents
    return (Merge(rows, cols, work.sizes[work.inner], work.itemsize),)


#: A fused kernel (:mod:`runlora_fx.kernels`), and so for devices that have measured it.
_MERGE_KERNEL = Implementation(
    "merge_kernel", Accumulate, _merge, _merges, is_usual=False, needs_times=True
)


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


#: It costs nothing: it is fused into its reader.
_REPEAT = Implementation("repeat", Product, lambda work: (), _repeats)


def _scales(work: Work) -> bool:
    step = work.product
    return step is not None and (step.left.is_diagonal or step.right.is_diagonal)


def _scale(work: Work) -> tuple[Operation, ...]:
    # The reader of a demand is elementwise, and the scaling is fused into it.
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


def _multiplies_matrices(work: Work) -> bool:
    step = work.product
    return step is not None and not is_convolution(work.problem.leaves, step.left, step.right)


_MATMUL = Implementation("matmul", Product, lambda work: (_product(work),), _multiplies_matrices)


# -- convolutions ------------------------------------------------------------------------------


def _multiplies_images(work: Work) -> bool:
    step = work.product
    return step is not None and is_convolution(work.problem.leaves, step.left, step.right)


def _convolve(work: Work) -> tuple[Operation, ...]:
    """A product with images. Of overlapping patches the images are moved, and not the patches."""
    step, (_, m, n) = work.step, work.extents
    assert isinstance(step, Product)
    k = work.sizes[work.inner]
    sides = ((m, k, step.left), (k, n, step.right), (m, n, work.core))
    moved = [_in_memory(rows * cols, patch_size(work.problem.leaves, p)) for rows, cols, p in sides]
    return (Convolution(m, k, n, work.itemsize, moved[0] + moved[1], moved[2]),)


def _in_memory(elements: Amount, taps: int) -> Amount:
    """The elements of images, for those of their patches at every position."""
    return elements // taps if isinstance(elements, int) else elements / taps


_CONVOLUTION = Implementation("convolution", Product, _convolve, _multiplies_images)


# -- weights that are stored in few bits -------------------------------------------------------


def _virtual(work: Work) -> Polynomial | None:
    """The packed operand of ``X M'`` or ``M X'``; None if the product has none."""
    step = work.product
    for p, shown in ((step.right, step.right), (step.left, step.left.T)) if step else ():
        factor = shown.leaf
        if factor is not None and factor.transposed and work.problem.leaves[factor.leaf].packed:
            return p
    return None


def _dequantise(work: Work, p: Polynomial, itemsize: int) -> Operation:
    """The cost of reading a packed weight, and of writing it with some bytes per element."""
    assert p.leaf is not None
    spec = work.problem.leaves[p.leaf.leaf]
    elements = work.sizes[spec.rows] * work.sizes[spec.cols]
    return Elementwise(elements * (spec.packed + 8 * itemsize) // 8)


def _multiply_packed(work: Work) -> tuple[Operation, ...]:
    virtual = _virtual(work)
    assert virtual is not None
    # It pays for unpacking, so a plan that unpacks the weight anyway multiplies by the unpacked
    # one.
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

_PICK = Implementation("pick", Pick, experts.pick)
_SCATTER = Implementation("scatter", Scatter, experts.scatter)
_GROUPED = Implementation("grouped", GroupedProduct, experts.grouped)
_WITH_ALL = Implementation(
    "with_all", ProductWithAll, experts.with_all, is_usual=False, spares_picks=True
)
_GROUPED_OUTER = Implementation("grouped_outer", GroupedOuter, experts.grouped_outer)

#: All implementations by name. Of those that serve a step the first usual one prices a graph that
#: takes the step. So the special products come before the one that multiplies any two matrices.
REGISTERED = {
    one.name: one
    for one in (
        *(_SUM, _ADDMM, _KEPT, _MERGE_KERNEL, _KEEP),
        *(_DIAGONAL, _REPEAT, _SCALE, _TOTAL, _GEMM_4BIT, _MATMUL, _CONVOLUTION, _UNPACK),
        *(_PICK, _SCATTER, _GROUPED, _WITH_ALL, _GROUPED_OUTER),
    )
}
