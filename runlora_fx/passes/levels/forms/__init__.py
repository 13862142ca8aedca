"""Forms: what a node computes, in terms that all graph levels share.

    aten.addmm(b, x, w)      ->      WeightedSum of Broadcast(b) and MatrixProduct(x, w)

The readers of a level make the form of a node from its arguments. The graph reader gets the cut and
the polynomial from the form. A form contains only the nodes that it reads, and learns everything
else through the protocols in ``form.py``. A new form is one class in one file here.

A form is not a step of a plan: a :class:`MatrixProduct` is what a node computes, a
``steps.Product`` is a way to compute a value.

Invariant: the polynomial of a form is exactly what the node computes.
"""

from runlora_fx.passes.levels.forms.broadcasts import Broadcast, RepeatedRow, Total
from runlora_fx.passes.levels.forms.form import (
    Diagonals,
    Form,
    LinearNodes,
    Operand,
    Reading,
    VirtualOperand,
)
from runlora_fx.passes.levels.forms.multiples import DiagonalMultiple, ScalarMultiple, Shift
from runlora_fx.passes.levels.forms.products import (
    DiagonalOfProduct,
    Identity,
    MatrixProduct,
    RepeatedProduct,
    SumOfProducts,
)
from runlora_fx.passes.levels.forms.sums import WeightedSum
from runlora_fx.passes.levels.forms.views import Cast, Copy, Permute, Reshape
from runlora_fx.passes.levels.forms.written import Written

__all__ = [
    "Broadcast",
    "Cast",
    "Copy",
    "DiagonalMultiple",
    "DiagonalOfProduct",
    "Diagonals",
    "Form",
    "Identity",
    "LinearNodes",
    "MatrixProduct",
    "Operand",
    "Permute",
    "Reading",
    "RepeatedProduct",
    "RepeatedRow",
    "Reshape",
    "ScalarMultiple",
    "Shift",
    "SumOfProducts",
    "Total",
    "VirtualOperand",
    "WeightedSum",
    "Written",
]
