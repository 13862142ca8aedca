"""Written leaves: tensors that emission made because no node of the graph held them.

Example: ``full([40, 1], 1.0)`` is the column of ones that a plan multiplies by.

Invariant: read back, a written tensor is the leaf that it was written for.
"""

from __future__ import annotations

from dataclasses import dataclass

from runlora_fx.passes.algebra.addends import Addends
from runlora_fx.passes.levels.cuts import Cut
from runlora_fx.passes.levels.forms.form import Form, Reading
from runlora_fx.passes.levels.origins import Origin
from runlora_fx.passes.levels.sizes import Shape, same_shape


@dataclass(frozen=True)
class Written(Form):
    """The tensor of a leaf, as its origin writes it: a matrix, or a vector that is a row."""

    origin: Origin

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """The leaf, or its transpose where a column is seen as a row."""
        if len(shape) not in (1, 2):
            return None
        rows, cols = (1, *shape)[-2:]
        leaf = reading.virtual(self.origin, rows, cols)
        shown = cut.extents(shape)
        if same_shape(shown, (1, rows, cols)):
            return (leaf,)
        return (leaf.T,) if same_shape(shown, (1, cols, rows)) else None
