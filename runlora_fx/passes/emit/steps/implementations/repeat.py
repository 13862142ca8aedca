"""A vector that is repeated: a product with ones on the left (rows) or on the right (columns).

    1 b'                    ->      expand(b, [rows, -1])

A sum adds the vector itself. So this is written only if something else reads the whole matrix.

Invariant: ``expand`` returns a view, so no memory is written.
"""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Step
from runlora_fx.passes.emit.steps.registry import Emission, writes


@writes("repeat")
def write(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Write the matrix that repeats a row or a column, or its transpose."""
    return emission.broadcasts.repeated(value, transposed)
