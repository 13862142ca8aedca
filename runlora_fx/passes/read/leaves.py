"""Leaves: tensors that no linear operator made, as matrices with numbers.

Example: under autocast each use of ``x`` has its own cast, and all of them are one leaf.

Invariant: equal values that are seen as matrices of equal sizes have one number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from torch import fx

from runlora_fx.passes.algebra import polynomials as algebra
from runlora_fx.passes.algebra.assignments import Picked
from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar, substitute
from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.algebra.words import Factor, NotInNormalForm, Word
from runlora_fx.passes.levels.assigned import PickedRows, TokenAssignment
from runlora_fx.passes.levels.cuts import Cut
from runlora_fx.passes.levels.origins import Held, OnesColumn, Origin
from runlora_fx.passes.levels.sizes import Shape, equal, is_one, numel, same_shape, shape_of
from runlora_fx.passes.read.value_numbers import ValueNumbers


@dataclass(frozen=True)
class Leaf:
    """A tensor that no linear node made, as a matrix (or a batch of them).

    Attributes:
        origin: Where the tensor comes from.
        batch: Matrices in the batch; 1 for a plain matrix.
        rows: Rows of each.
        cols: Columns of each.
        batched: True if it is a batch of matrices.
        diagonal: True if it is the diagonal matrix of a vector.
        picked: The leaf of all experts and the assignment, if it has each token's matrix of them.
    """

    origin: Origin
    batch: Dim
    rows: Dim
    cols: Dim
    batched: bool
    diagonal: bool = False
    picked: Picked | None = None

    @property
    def node(self) -> fx.Node | None:
        """The node that holds the tensor; None if the leaf is virtual."""
        return self.origin.node

    @property
    def is_ones(self) -> bool:
        """True if it is the column of ones that repeats a row."""
        return isinstance(self.origin, OnesColumn)

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The nodes that have to exist for the tensor to."""
        return self.origin.sources


class ScalarLeaf(NamedTuple):
    """A 0-d tensor or symbolic number, or its inverse."""

    node: fx.Node
    inverse: bool


@dataclass
class Leaves:
    """The leaves that were numbered so far."""

    matrices: list[Leaf] = field(default_factory=list)
    scalars: list[ScalarLeaf] = field(default_factory=list)
    assignments: list[TokenAssignment] = field(default_factory=list)
    _index: dict[object, int] = field(default_factory=dict)
    _polynomials: dict[int, Polynomial] = field(default_factory=dict)

    def matrix(self, values: ValueNumbers, node: fx.Node, cut: Cut) -> Polynomial:
        """A tensor as a leaf; the same one for equal values seen as equal matrices."""
        extents, turned = _oriented(shape_of(node), cut)
        key = (values.of(node), extents)
        index = self._index.get(key)
        if index is None:
            index = self._added(key, Leaf(_held(values, node), *extents, not is_one(extents[0])))
        found = self._polynomial(index)
        return found.T if turned else found

    def find(self, values: ValueNumbers, node: fx.Node, cut: Cut) -> Factor | None:
        """The factor of a tensor that is a leaf already; None if it is none."""
        extents, turned = _oriented(shape_of(node), cut)
        index = self._index.get((values.of(node), extents))
        return None if index is None else Factor(index, turned)

    def ones(self, rows: Dim) -> Polynomial:
        """The column of ones that repeats a row: the identity where there is one row."""
        if is_one(rows):
            return algebra.IDENTITY
        origin = OnesColumn(rows)
        return algebra.leaf(
            self._numbered((OnesColumn, rows), lambda: Leaf(origin, 1, rows, 1, False))
        )

    def virtual(self, values: ValueNumbers, origin: Origin, rows: Dim, cols: Dim) -> Polynomial:
        """A matrix that no node holds, as a leaf; the same one for equal origins."""
        if isinstance(origin, OnesColumn):
            return self.ones(origin.rows)
        key = (origin.key(values), (1, rows, cols))  # as for a node that holds it
        return algebra.leaf(self._numbered(key, lambda: Leaf(origin, 1, rows, cols, False)))

    def diagonal(self, values: ValueNumbers, vector: fx.Node) -> Polynomial:
        """The diagonal matrix of a vector."""
        number, size = values.of(vector), numel(shape_of(vector))
        index = self._numbered(
            ("diagonal", number),
            lambda: Leaf(_held(values, vector), 1, size, size, False, diagonal=True),
        )
        return algebra.leaf(index, diagonal=True)

    def assignment(self, values: ValueNumbers, by: TokenAssignment) -> int:
        """The number of an assignment; the same one for equal indices or offsets."""
        key = by.key(values)
        if key not in self._index:
            self._index[key] = len(self.assignments)
            self.assignments.append(by)
        return self._index[key]

    def picked(self, p: Polynomial, k: int) -> Polynomial:
        """``p[k]``: for each token the matrix of its expert.

        Raises:
            NotInNormalForm: If a word is scattered, or a leaf has no matrix for each expert.
        """
        if any(word.scattered or not word.factors for word in p.words):
            raise NotInNormalForm("what is scattered or the identity is picked by no leaves")
        leaves = {leaf: self._picked(leaf, k) for leaf in sorted(p.leaves)}
        return substitute(p, leaves, {s: s for s in p.scalar_leaves})

    def _picked(self, base: int, k: int) -> int:
        leaf, by = self.matrices[base], self.assignments[k]
        if leaf.picked is not None or leaf.diagonal or not equal(leaf.batch, by.experts):
            raise NotInNormalForm(f"the leaf {leaf.origin.name} has no matrix for each expert")
        return self._numbered(
            ("picked", base, k),
            lambda: Leaf(
                PickedRows(leaf.origin, by),
                by.tokens,
                leaf.rows,
                leaf.cols,
                batched=True,
                picked=Picked(base, k),
            ),
        )

    def multiplied(self, left: Polynomial, right: Polynomial) -> Polynomial:
        """``left @ right``, by ``sum_k(P) Q = sum_k(P Q[k])`` for scattered words.

        Raises:
            NotInNormalForm: If both words of a pair are scattered, or a leaf cannot be picked.
        """
        if not any([word.scattered for word, _ in (*left.terms, *right.terms)]):
            return left @ right
        found: list[tuple[Word, float]] = []
        for u, a in left.terms:
            for v, b in right.terms:
                first, second = (Polynomial(((word, 1.0),)) for word in (u, v))
                if u.scattered and not v.scattered:
                    second = self.picked(second, u.scattered[0])
                elif v.scattered and not u.scattered:
                    first = self.picked(first, v.scattered[0])
                found += [(word, c * a * b) for word, c in (first @ second).terms]
        return algebra.polynomial(found)

    def scalar(self, values: ValueNumbers, node: fx.Node, *, inverse: bool) -> Scalar:
        """A 0-d tensor or symbolic number, or its inverse, as a scalar leaf."""
        number = values.of(node)
        key = ("scalar", number, inverse)
        if key not in self._index:
            self._index[key] = len(self.scalars)
            self.scalars.append(ScalarLeaf(values.first(number), inverse))
        return Scalar(1.0, (self._index[key],))

    def _polynomial(self, index: int) -> Polynomial:
        """The polynomial of a leaf: one object for each leaf, because it caches its properties."""
        found = self._polynomials.get(index)
        if found is None:
            found = self._polynomials[index] = algebra.leaf(index)
        return found

    def _numbered(self, key: object, make: Callable[[], Leaf]) -> int:
        """The number of a leaf, made if it is new."""
        index = self._index.get(key)
        return self._added(key, make()) if index is None else index

    def _added(self, key: object, leaf: Leaf) -> int:
        """The number of a new leaf."""
        self._index[key] = index = len(self.matrices)
        self.matrices.append(leaf)
        return index


def _held(values: ValueNumbers, node: fx.Node) -> Held:
    """The earliest node that holds the value of a node."""
    return Held(values.first(values.of(node)))


@lru_cache(maxsize=1 << 14)
def _oriented(shape: Shape, cut: Cut) -> tuple[tuple[Dim, Dim, Dim], bool]:
    """A tensor's extents as a matrix, and whether the cut shows the transpose of it.

    Two views of one vector may show it as a row and as a column. Both are the same leaf, one of
    them transposed.
    """
    batch, rows, cols = extents = cut.extents(shape)
    if len(shape) > 1 and is_one(batch) and (is_one(rows) or is_one(cols)):
        stands = (numel(shape[:-1]), shape[-1])
        if same_shape(stands, (cols, rows)) and not same_shape(stands, (rows, cols)):
            return (1, cols, rows), True
    return extents, False
