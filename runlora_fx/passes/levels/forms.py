"""Forms: what a node computes, in the few terms that all graph levels share.

Dialects translate nodes into forms; the reader turns forms into polynomials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

from runlora_fx.passes.levels.cuts import Cut


@dataclass(frozen=True)
class Operand:
    """A node as a matrix, maybe transposed."""

    node: fx.Node
    cut: Cut
    transposed: bool = False


@dataclass(frozen=True)
class Product:
    """``left @ right``, seen through ``out`` in the node's own shape."""

    left: Operand
    right: Operand
    out: Cut


@dataclass(frozen=True)
class Dots:
    """The diagonal of ``left @ right``: the dot products of rows and columns, as a vector."""

    left: Operand
    right: Operand
    out: Cut


@dataclass(frozen=True)
class Sum:
    """``sum(c * term)``; terms may be of lower rank and broadcast."""

    terms: tuple[tuple[fx.Node | Product, float], ...]


@dataclass(frozen=True)
class Scale:
    """``source * number`` or, with a node, ``source * (0-d tensor or symbolic number)``.

    Attributes:
        source: What is scaled.
        by: What it is scaled by.
        divides: Whether it is divided by it instead.
    """

    source: fx.Node
    by: float | fx.Node
    divides: bool = False


@dataclass(frozen=True)
class Stretch:
    """``source * vector``: every column scaled by an entry of the vector, or every row.

    Attributes:
        source: A tensor of the result's shape.
        by: The vector, with the other dimensions of the result's missing or 1.
        rows: Whether rows are scaled: the vector has the result's dimensions but the last.
    """

    source: fx.Node
    by: fx.Node
    rows: bool


@dataclass(frozen=True)
class Shift:
    """``source + number``."""

    source: fx.Node
    by: float


@dataclass(frozen=True)
class Reshape:
    """The same elements in the same order, or simply the same tensor."""

    source: fx.Node


@dataclass(frozen=True)
class Copy:
    """The same values in new memory: dropout in evaluation, ``clone``, ``contiguous``.

    Read through where the values are an operand. What is copied stays a root, for whoever asked for
    the copy may rely on its layout; unless the copy is only added to something.
    """

    source: fx.Node


@dataclass(frozen=True)
class Permute:
    """Dimensions in another order."""

    source: fx.Node
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Identity:
    """The identity matrix."""


@dataclass(frozen=True)
class Ones:
    """A tensor of ones: the column of ones times a row of ones."""


@dataclass(frozen=True)
class Broadcast:
    """The source, repeated to the node's shape: the column of ones times a row, or a column."""

    source: fx.Node


@dataclass(frozen=True)
class Total:
    """The sum of the source's rows, as one row (``1' M``), or of its columns (``M 1``).

    Attributes:
        source: Seen as a matrix by its last dimension.
        rows: Whether its rows are added up; else its columns.
    """

    source: fx.Node
    rows: bool


@dataclass(frozen=True)
class Cast:
    """The source in another dtype: a border of the region, unless it changes nothing."""

    source: fx.Node


Form: TypeAlias = (
    Product
    | Dots
    | Sum
    | Scale
    | Stretch
    | Shift
    | Reshape
    | Copy
    | Permute
    | Identity
    | Ones
    | Broadcast
    | Total
    | Cast
)


def products(form: Form) -> list[Product]:
    """The matrix products in a form."""
    terms = [term for term, _ in form.terms] if isinstance(form, Sum) else [form]
    return [term for term in terms if isinstance(term, Product)]
