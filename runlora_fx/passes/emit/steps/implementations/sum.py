"""Sums of values.

    X W' + Z                ->      add(mm(X, W'), Z)

Invariant: a sum has the dtype of its narrowest leaf, and is rounded once.
"""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.algebra.polynomials import normalise
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Step, Sum
from runlora_fx.passes.emit.steps.registry import Emission, writes


@writes("sum")
def write(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Write a sum, or its transpose."""
    assert isinstance(step, Sum)
    scope, parts = emission.scope, [normalise(part) for part in step.parts]
    total = emission.sums.added_up(parts, transposed, value.backward)
    return scope.writer.cast(total, scope.dtype(value))
