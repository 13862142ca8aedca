"""Products with a column of ones on the left or a row of ones on the right: a repeated vector.

    1 b'                    ->      expand(b, [rows, -1])

A sum adds the vector itself. So this is written only where something else reads the matrix.

Invariant: nothing is copied.
"""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Step
from runlora_fx.passes.emit.steps.registry import Emission, writes


@writes("repeat")
def write(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Write the matrix that repeats a row or a column."""
    return emission.broadcasts.repeated(value, transposed)
