"""Leaves: tensors that no linear operator made, as matrices with numbers.

Example: under autocast each use of ``x`` has its own cast, and all of them are one leaf.

Invariant: equal values that are seen as matrices of equal sizes have one number.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import NamedTuple

from torch import fx

from runlora_fx.passes.algebra import polynomials as algebra
from runlora_fx.passes.algebra.assignments import Picked
from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar, substitute
from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.algebra.words import Factor, NotInNormalForm, Word
from runlora_fx.passes.levels.assigned import PickedRows, TokenAssignment
from runlora_fx.passes.levels.cuts import Cut
from runlora_fx.passes.levels.geometry import Geometry, KernelOf, Patches
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
        images: True if it is a batch of images: its rows are their positions.
        taps: For patches of images, and for kernels that multiply them: the elements of a patch, or
            kernel, of one channel; 0 for any other leaf.
        kernel_of: For such a kernel, the leaf of the same matrix, whatever it multiplies.
    """

    origin: Origin
    batch: Dim
    rows: Dim
    cols: Dim
    batched: bool
    diagonal: bool = False
    picked: Picked | None = None
    images: bool = False
    taps: int = 0
    kernel_of: int | None = None

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
        key = _key(values, node, cut, extents)
        index = self._index.get(key)
        if index is None:
            is_batch, are_images = not is_one(extents[0]), cut.images is not None
            leaf = Leaf(_held(values, node), *extents, is_batch, images=are_images)
            index = self._added(key, leaf)
        found = self._polynomial(index)
        return found.T if turned else found

    def find(self, values: ValueNumbers, node: fx.Node, cut: Cut) -> Factor | None:
        """The factor of a tensor that is a leaf already; None if it is none."""
        extents, turned = _oriented(shape_of(node), cut)
        index = self._index.get(_key(values, node, cut, extents))
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

    def patches(self, values: ValueNumbers, origin: Patches, rows: Dim, cols: Dim) -> Polynomial:
        """The patches of images that a convolution multiplies, as rows of a matrix."""
        taps, key = origin.geometry.taps, (origin.key(values), (1, rows, cols))
        make = partial(Leaf, origin, 1, rows, cols, False, images=True, taps=taps)
        return algebra.leaf(self._numbered(key, make))

    def kernel(self, p: Polynomial, geometry: Geometry) -> Polynomial:
        """A matrix as a kernel that multiplies patches of a geometry: its last leaves are kernels.

        Raises:
            NotInNormalForm: If a last factor is no matrix that a node holds.
        """
        found = []
        for word, number in p.terms:
            last = word.factors[-1] if word.factors else None
            if last is None or last.transposed or last.diagonal or word.scattered:
                raise NotInNormalForm("no matrix of the weight's own shape is its last factor")
            leaf = Factor(self._kernel(last.leaf, geometry))
            found.append((word._replace(factors=(*word.factors[:-1], leaf)), number))
        return algebra.polynomial(found)

    def _kernel(self, base: int, geometry: Geometry) -> int:
        leaf = self.matrices[base]
        if not isinstance(leaf.origin, Held) or leaf.batched or leaf.images:
            raise NotInNormalForm(f"the leaf {leaf.origin.name} is no matrix that a node holds")
        origin = KernelOf(leaf.origin.node, geometry)
        make = partial(replace, leaf, origin=origin, taps=geometry.taps, kernel_of=base)
        return self._numbered(("kernel", base, geometry), make)

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


def _key(values: ValueNumbers, node: fx.Node, cut: Cut, extents: tuple[Dim, Dim, Dim]) -> Hashable:
    """What the leaves of a tensor have in common that are seen as equal matrices."""
    number = values.of(node)
    return (number, extents) if cut.images is None else (number, extents, cut.images)


@lru_cache(maxsize=1 << 14)
def _oriented(shape: Shape, cut: Cut) -> tuple[tuple[Dim, Dim, Dim], bool]:
    """A tensor's extents as a matrix, and whether the cut shows the transpose of it.

    Two views of one vector may show it as a row and as a column. Both are the same leaf, one of
    them transposed.
    """
    batch, rows, cols = extents = cut.extents(shape)
    if cut.images is not None:
        return extents, False
    if len(shape) > 1 and is_one(batch) and (is_one(rows) or is_one(cols)):
        stands = (numel(shape[:-1]), shape[-1])
        if same_shape(stands, (cols, rows)) and not same_shape(stands, (rows, cols)):
            return (1, cols, rows), True
    return extents, False
