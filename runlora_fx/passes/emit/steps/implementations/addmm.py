"""Products that are added to a matrix by the call that multiplies; also kept for later calls.

    W + s B A               ->      addmm(W, B, A, alpha=s)
    W + s B A, kept         ->      runlora::merged_weight(W, B, A, s)

Invariant: what is kept is made of tensors that are the same in every call.
"""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.algebra.polynomials import normalise
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Accumulate, Step
from runlora_fx.passes.emit.steps.products import Operands
from runlora_fx.passes.emit.steps.registry import Emission, writes


@writes("addmm")
def addmm(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Write a sum with a product, or its transpose."""
    scope = emission.scope
    total = emission.products.accumulated(*_operands(emission, value, step, transposed))
    return scope.writer.cast(total, scope.dtype(value))


@writes("kept")
def kept(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Write a merged weight that is kept from call to call, or its transpose."""
    leaves = emission.scope.leaves.matrices
    if len({leaves[i].origin.dtype for i in value.core.leaves}) > 1:
        # An operand is the result of a cast, and so another tensor in every call.
        return addmm(emission, value, step, transposed)
    total, (a, b, by) = _operands(emission, value, step, transposed)
    return emission.scope.writer.merged_weight(total, a, b, by.number)


def _operands(
    emission: Emission, value: Value, step: Step, transposed: bool
) -> tuple[fx.Node, Operands]:
    """What is added to, and what is multiplied."""
    assert isinstance(step, Accumulate)
    total = emission.sums.addend(normalise(step.addend), transposed, value.backward)
    # In the dtype of its own leaves: a product is rounded to another dtype once, when it is added.
    product = Value(step.left @ step.right, value.backward)
    return total, emission.products.operands(product, step, transposed)
