"""Forms: what a node computes, in the few terms that all graph levels share.

In: the readers of a level make a form of a node's arguments. Out: the reader asks the form for its
cut and its polynomial. A form knows nothing of graphs beyond the nodes that it names, and asks for
everything else through the two protocols in ``form.py``. A new form is one class in one file here.

Forms are named apart from the steps of a plan: a :class:`MatrixProduct` is what a node computes, a
``plan.Product`` is a way to compute a value.
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
