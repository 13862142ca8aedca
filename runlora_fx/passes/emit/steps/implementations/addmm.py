"""A matrix plus a product in one call, and merged weights that are kept between calls.

    W + s B A               ->      addmm(w, b, a, alpha=s)
    W + s B A, kept         ->      runlora::merged_weight(w, b, a, s)
    W + s B A, fused        ->      runlora::fused_merge(w, b, a, s)

Invariant: a kept weight is made of parameters, which are the same tensors in every call.
"""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.algebra.polynomials import normalise
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Accumulate, Step
from runlora_fx.passes.emit.steps.products import Operands
from runlora_fx.passes.emit.steps.registry import Emission, writes
from runlora_fx.passes.emit.steps.scope import dtype_of


@writes("addmm")
def addmm(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Write the sum of a matrix and a product, or its transpose."""
    scope = emission.scope
    total = emission.products.accumulated(*_operands(emission, value, step, transposed))
    return scope.writer.cast(total, scope.dtype(value))


@writes("kept")
def kept(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Write a merged weight that is kept between calls, or its transpose."""
    leaves = emission.scope.leaves.matrices
    if len({leaves[i].origin.dtype for i in value.core.leaves}) > 1:
        # Leaves of several dtypes are cast, and the result of a cast is a new tensor in every call.
        return addmm(emission, value, step, transposed)
    total, (a, b, by) = _operands(emission, value, step, transposed)
    return emission.scope.writer.merged_weight(total, a, b, by.number)


@writes("merge_kernel")
def merge_kernel(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Write a merged weight, or its transpose, by the fused kernel.

    A plan may have been made for another machine: without Triton here it runs as a plain sum. So it
    does where the leaves have several dtypes, as the kernel was measured in one.
    """
    leaves, writer = emission.scope.leaves.matrices, emission.scope.writer
    is_alike = len({leaves[i].origin.dtype for i in value.core.leaves}) == 1
    total, (a, b, by) = _operands(emission, value, step, transposed)
    is_plain = not by.leaves and dtype_of(total) == dtype_of(a) == dtype_of(b)
    if not (is_alike and is_plain and writer.merges_fused):
        product = emission.products.accumulated(total, Operands(a, b, by))
        return writer.cast(product, emission.scope.dtype(value))
    return writer.merged_fused(total, a, b, by.number)


def _operands(
    emission: Emission, value: Value, step: Step, transposed: bool
) -> tuple[fx.Node, Operands]:
    """The addend, and the operands of the product."""
    assert isinstance(step, Accumulate)
    total = emission.sums.addend(normalise(step.addend), transposed, value.backward)
    # The product has the dtype of its own leaves. It is rounded once, when it is added.
    product = Value(step.left @ step.right, value.backward)
    return total, emission.products.operands(product, step, transposed)
