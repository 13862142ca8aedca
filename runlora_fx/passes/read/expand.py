"""Expansion: from forms to polynomials, given what a tensor's consumers take it for.

Shared by the reader, which stops at roots, and by the verifier, which reads an emitted graph back
down to the leaves of the polynomial it is to prove.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, TypeAlias

from torch import fx

from runlora_fx.passes.algebra import polynomials as algebra
from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar
from runlora_fx.passes.levels.cuts import (
    Cut,
    inverse,
    last_dim_cut,
    permuted_cut,
    recut,
    repetition,
    same_matrix,
)
from runlora_fx.passes.levels.forms import (
    Broadcast,
    Cast,
    Copy,
    Dots,
    Form,
    Identity,
    Ones,
    Permute,
    Product,
    Reshape,
    Scale,
    Shift,
    Stretch,
    Sum,
    Total,
    products,
)
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.levels.sizes import Shape, is_one, numel, same_shape, shape_of
from runlora_fx.passes.read.leaves import Leaves
from runlora_fx.passes.read.value_numbers import ValueNumbers

#: How many nodes :func:`is_made_of_product` looks through.
_DEPTH = 6

#: What the graph adds up to a value: one polynomial for each product or leaf.
Addends: TypeAlias = tuple[Polynomial, ...]

#: The terms of a sum with their coefficients.
Terms: TypeAlias = tuple[tuple[fx.Node | Product, float], ...]


class Expander(ABC):
    """Expands nodes into addends; :meth:`operand` decides where to stop."""

    def __init__(self, values: ValueNumbers, leaves: Leaves, forms: dict[fx.Node, Form]) -> None:
        """Share the tables of one graph."""
        self.values = values
        self.leaves = leaves
        self.forms = forms

    @abstractmethod
    def operand(self, node: fx.Node, cut: Cut) -> Addends:
        """Any tensor, seen through a cut: what its consumers read."""

    def expand(self, node: fx.Node, cut: Cut) -> Addends | None:
        """What a node computes, seen through a cut; None if its form shows no such matrix."""
        shape = shape_of(node)
        match self.forms.get(node):
            case Identity():
                return (algebra.IDENTITY,)
            case Product() as form if same_matrix(shape, form.out, cut):
                return self.product(form)
            case Dots() as form:  # a vector: as a row or as a column, all the same
                left, right = self.factors(form)
                return ((total(left) @ total(right)).dots,)
            case Sum(terms):
                return self._sum(terms, shape, cut)
            case Broadcast(source):
                return self.broadcast(source, shape, cut)
            case Ones():
                return self._ones(shape, cut)
            case Total() as form:
                return self._total(form, shape, cut)
            case Copy(source):
                return self.operand(source, cut)
            case Reshape(source):
                mapped = recut(shape, cut, shape_of(source))
                return None if mapped is None else self.operand(source, mapped)
            case Permute(source, dims):
                seen = permuted_cut(shape, cut, inverse(dims))
                if seen is None:
                    return None
                below = self.operand(source, seen[0])
                return _transposed(below) if seen[1] else below
            case Scale(source) as form:
                return _scaled(self.operand(source, cut), self._scalar(form))
            case Stretch() as form:
                return self._stretched(form, shape, cut)
        return None

    def factors(self, form: Product | Dots) -> tuple[Addends, Addends]:
        """The operands of a product, as the graph adds them up."""
        left, right = (
            _transposed(self.operand(o.node, o.cut))
            if o.transposed
            else self.operand(o.node, o.cut)
            for o in (form.left, form.right)
        )
        return left, right

    def product(self, form: Product) -> Addends:
        """A product, as the one addend that it is."""
        left, right = self.factors(form)
        return (total(left) @ total(right),)

    def _stretched(self, form: Stretch, shape: Shape, cut: Cut) -> Addends | None:
        """A tensor times a vector, if the vector runs along the rows or the columns of the cut."""
        lies = stretches(form, shape, cut)
        if lies is None:
            return None
        diagonal = self.diagonal(form.by)
        below = self.operand(form.source, cut)
        return tuple(diagonal @ p if lies == "rows" else p @ diagonal for p in below)

    def diagonal(self, vector: fx.Node) -> Polynomial:
        """The diagonal matrix of a vector: ``g - 1`` is ``diag(g) - I``."""
        match self.forms.get(vector):
            case Reshape(source):
                return self.diagonal(source)
            case Shift(source, by):
                shift = algebra.IDENTITY.scaled(Scalar(by))
                return self.diagonal(source) + shift if by else self.diagonal(source)
            case Scale(source, float(by)):
                return self.diagonal(source).scaled(Scalar(by))
        return self.leaves.diagonal(self.values, vector)

    def _sum(self, terms: Terms, shape: Shape, cut: Cut) -> Addends | None:
        found: list[Polynomial] = []
        for term, c in terms:
            below = (
                self.product(term)
                if isinstance(term, Product)
                else self.broadcast(term, shape, cut)
            )
            if below is None:
                return None
            found += _scaled(below, Scalar(c))
        return tuple(found)

    def broadcast(self, source: fx.Node, shape: Shape, cut: Cut) -> Addends | None:
        """A tensor repeated to a shape: the column of ones times a row, or a column times a row."""
        if same_shape(shape_of(source), shape):
            return self.operand(source, cut)
        lies = repetition(shape_of(source), shape, cut)
        if lies is None:
            return None
        _, rows, cols = cut.extents(shape)
        ones = self.leaves.ones(rows if lies.rows else cols)
        below = self.operand(source, lies.cut)
        return tuple(ones @ p if lies.rows else p @ ones.T for p in below)

    def _ones(self, shape: Shape, cut: Cut) -> Addends | None:
        batch, rows, cols = cut.extents(shape)
        return (self.leaves.ones(rows) @ self.leaves.ones(cols).T,) if is_one(batch) else None

    def _total(self, form: Total, shape: Shape, cut: Cut) -> Addends | None:
        """``1' M`` or ``M 1``: the same vector, shown as a row or as a column."""
        source = shape_of(form.source)
        seen = last_dim_cut(len(source))
        _, rows, cols = seen.extents(source)
        below = self.operand(form.source, seen)
        size = cols if form.rows else rows
        ones = self.leaves.ones(rows if form.rows else cols)
        totals = tuple(ones.T @ p if form.rows else p @ ones for p in below)
        shown = cut.extents(shape)
        if same_shape(shown, (1, 1, size) if form.rows else (1, size, 1)):
            return totals
        if same_shape(shown, (1, size, 1) if form.rows else (1, 1, size)):
            return _transposed(totals)
        return None

    def _scalar(self, form: Scale) -> Scalar:
        by = form.by
        if not isinstance(by, fx.Node):
            return Scalar(by)
        while isinstance(view := self.forms.get(by), Reshape):
            by = view.source
        return self.leaves.scalar(self.values, by, inverse=form.divides)


def total(addends: Addends) -> Polynomial:
    """The sum of addends."""
    if len(addends) == 1:
        return addends[0]
    return algebra.polynomial(term for p in addends for term in p)


def without_cancelled(addends: Addends) -> Addends:
    """The same sum without the words that vanish from it."""
    if len(addends) == 1:
        return addends
    left_over = set(total(addends).words)
    if left_over.issuperset(word for p in addends for word in p.words):
        return addends
    kept = (algebra.polynomial((w, c) for w, c in p.terms if w in left_over) for p in addends)
    return tuple(p for p in kept if p.terms)


def sources(form: Form) -> list[fx.Node]:
    """The nodes that a form reads."""
    match form:
        case Product(left, right) | Dots(left, right):
            return [left.node, right.node]
        case Sum(terms):
            nested = (sources(t) if isinstance(t, Product) else [t] for t, _ in terms)
            return [node for group in nested for node in group]
        case Scale(source, by):
            return [source, by] if isinstance(by, fx.Node) else [source]
        case Stretch(source, by, _):
            return [source, by]
        case Shift(source, _):
            return [source]
        case Reshape(source) | Copy(source) | Permute(source, _) | Cast(source):
            return [source]
        case Broadcast(source) | Total(source, _):
            return [source]
    return []


def is_made_of_product(dialect: Dialect, node: fx.Node, depth: int = _DEPTH) -> bool:
    """Whether a product of matrices is added up, scaled, viewed or cast to a node."""
    form = dialect.read(node)
    if form is None or depth == 0:
        return False
    return bool(products(form)) or any(
        is_made_of_product(dialect, source, depth - 1) for source in sources(form)
    )


def stretches(form: Stretch, shape: Shape, cut: Cut) -> Literal["rows", "columns"] | None:
    """What of a matrix a vector scales; None if it runs along neither its rows nor its columns.

    A vector that scales the last dimension runs along the columns of a matrix that shows just that
    dimension there; one that scales all others along the rows.
    """
    if not same_shape(cut.extents(shape), (1, numel(shape[:-1]), shape[-1])):
        return None
    return "rows" if form.rows else "columns"


def _scaled(addends: Addends, by: Scalar) -> Addends:
    return tuple(p.scaled(by) for p in addends)


def _transposed(addends: Addends) -> Addends:
    return tuple(p.T for p in addends)
