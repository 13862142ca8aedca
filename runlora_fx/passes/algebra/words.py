"""Words: products of factors, the terms of matrix polynomials.

Before -> after: ``(A' diag(g) B)'`` -> ``B' diag(g) A``.

Invariant: transposes stand at leaves, and neighbouring diagonal matrices are sorted, because they
commute. So two products that are equal for all values of their leaves are the same word.
"""

from __future__ import annotations

from typing import NamedTuple


class Factor(NamedTuple):
    """A leaf matrix, its transpose, or the diagonal matrix of a leaf vector."""

    leaf: int
    transposed: bool = False
    diagonal: bool = False

    @property
    def T(self) -> Factor:
        """The transposed factor; a diagonal matrix is its own."""
        return self if self.diagonal else Factor(self.leaf, not self.transposed)


Factors = tuple[Factor, ...]


class NotInNormalForm(ValueError):
    """The result has no polynomial.

    A scattered word is scattered, picked or squared, or a diagonal part is multiplied by a matrix.
    """


class Word(NamedTuple):
    """A product of scalar leaves and of matrix factors, in order.

    Attributes:
        factors: The matrices.
        scalars: The scalars.
        diag_part: True if the word stands for the diagonal of that product, a vector.
        scattered: The assignment by which the product is scattered to experts; empty if it is not.
    """

    factors: Factors
    scalars: tuple[int, ...] = ()
    diag_part: bool = False
    scattered: tuple[int, ...] = ()

    @property
    def T(self) -> Word:
        """(U V)' = V' U'; a diagonal part is no matrix, and stays what it is."""
        return self if self.diag_part else self.mirrored

    @property
    def mirrored(self) -> Word:
        """V' U' for U V, whose diagonal is the same."""
        turned = [f if f.diagonal else Factor(f.leaf, not f.transposed) for f in self.factors[::-1]]
        return Word(in_order(tuple(turned)), self.scalars, self.diag_part, self.scattered)

    def __matmul__(self, other: Word) -> Word:
        """The product of two words.

        Raises:
            NotInNormalForm: If both are scattered, or one is a vector and the other a matrix.
        """
        if self.diag_part or other.diag_part:
            return self._times_identity(other)
        factors = _joined(self.factors, other.factors)
        if self.scattered and other.scattered:
            raise NotInNormalForm("two scattered words have no product in normal form")
        scattered = self.scattered or other.scattered
        return Word(factors, merge(self.scalars, other.scalars), scattered=scattered)

    def _times_identity(self, other: Word) -> Word:
        """The product of a diagonal part, which is no matrix, and the identity."""
        vector, matrix = (self, other) if self.diag_part else (other, self)
        if matrix.factors or matrix.diag_part:
            raise NotInNormalForm("a diagonal part is multiplied by no matrix")
        return vector._replace(scalars=merge(self.scalars, other.scalars))

    @property
    def without_diagonals(self) -> Factors:
        """The factors that are no diagonal matrices."""
        return tuple(f for f in self.factors if not f.diagonal)

    def sort_key(self) -> tuple[int, Factors, tuple[int, ...], bool, tuple[int, ...]]:
        """A key that sorts short words first, so that W leads W + s B A with coefficient 1."""
        return (len(self.factors), self.factors, self.scalars, self.diag_part, self.scattered)


def _joined(a: Factors, b: Factors) -> Factors:
    """The product of two products, with neighbouring diagonal matrices sorted."""
    if not (a and b and a[-1].diagonal and b[0].diagonal):
        return a + b
    i, j = len(a), 0
    while i and a[i - 1].diagonal:
        i -= 1
    while j < len(b) and b[j].diagonal:
        j += 1
    return (*a[:i], *sorted(a[i:] + b[:j]), *b[j:])


def in_order(factors: Factors) -> Factors:
    """A product with its neighbouring diagonal matrices sorted."""
    if not any([factor.diagonal for factor in factors]):
        return factors
    found: Factors = ()
    for factor in factors:
        found = _joined(found, (factor,))
    return found


def merge(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The sorted numbers of the scalar leaves of a product of scalars."""
    return tuple(sorted(a + b)) if a and b else a or b
