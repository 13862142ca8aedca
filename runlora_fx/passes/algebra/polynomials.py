"""Matrix polynomials: the normal form in which every linear region is read, planned and proven.

A *factor* is a leaf matrix or its transpose, or the diagonal matrix of a leaf vector (which scales
rows or columns), a *word* a product of factors, a *polynomial* a sum of words with scalar
coefficients. A coefficient is a number times a monomial of *scalar leaves*
(0-d tensors whose value only the run knows). Products are expanded over sums, transposes are
pushed to the leaves and like words are added, so two expressions denote the same function of their
leaves if and only if their polynomials are equal.

The gradient of a vector that scales rows or columns is no product of matrices but the *diagonal
part* of one: the vector ``sum(L * R', 1)`` of the dot products of the rows of L with the columns of
R, which is the diagonal of ``L R``. It is a word of its own kind. What it is the diagonal of can be
cut anywhere: ``diag_part(dY' (X A' B')) = diag_part((dY' X A') B')``.

A word may also be *scattered*: an assignment gives each of T tokens one of E experts, and a batch
of T matrices becomes a batch of E, each the sum over its tokens. The factors of such a word are
those of the T matrices: see :mod:`runlora_fx.passes.algebra.assignments`.

This module knows nothing of torch, shapes or costs: leaves are integers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

#: Significant digits kept of a coefficient once its sum is divided by a scalar: few enough that
#: 0.7 (P + Q / 3) and 0.5 (P + Q / 3) are the same sum, enough for double precision.
_DIGITS = 13


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
    """No polynomial says what is asked for.

    A scattered word is scattered, picked or squared, or a diagonal part is multiplied by a matrix.
    """


class Word(NamedTuple):
    """A product of scalar leaves and of matrix factors, in order.

    Attributes:
        factors: The matrices.
        scalars: The scalars.
        diag_part: Whether the word stands for the diagonal of that product, a vector.
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
        factors: Factors = tuple([factor.T for factor in reversed(self.factors)])
        if any([factor.diagonal for factor in factors]):
            turned, factors = factors, ()
            for factor in turned:
                factors = _joined(factors, (factor,))
        return Word(factors, self.scalars, self.diag_part, self.scattered)

    def __matmul__(self, other: Word) -> Word:
        """The two words behind one another; the leaves of a scattered word's partner are picked.

        Raises:
            NotInNormalForm: If both are scattered, or one is a vector and the other a matrix.
        """
        if self.diag_part or other.diag_part:
            return self._times_identity(other)
        factors = _joined(self.factors, other.factors)
        scattered = self.scattered or other.scattered
        if self.scattered and other.scattered:
            raise NotInNormalForm("two scattered words have no product in normal form")
        return Word(factors, _merge(self.scalars, other.scalars), scattered=scattered)

    def _times_identity(self, other: Word) -> Word:
        """A diagonal part, which is no matrix, behind or in front of the identity."""
        vector, matrix = (self, other) if self.diag_part else (other, self)
        if matrix.factors or matrix.diag_part:
            raise NotInNormalForm("a diagonal part is multiplied by no matrix")
        return vector._replace(scalars=_merge(self.scalars, other.scalars))

    @property
    def without_diagonals(self) -> Factors:
        """The factors that are no diagonal matrices."""
        return tuple(f for f in self.factors if not f.diagonal)

    def sort_key(self) -> tuple[int, Factors, tuple[int, ...], bool, tuple[int, ...]]:
        """Shortest first: the base weight leads W + s B A, and keeps the coefficient 1."""
        return (len(self.factors), self.factors, self.scalars, self.diag_part, self.scattered)


class Scalar(NamedTuple):
    """A number times a monomial of scalar leaves."""

    number: float = 1.0
    leaves: tuple[int, ...] = ()

    def __mul__(self, other: object) -> Scalar:
        """The product of two scalars."""
        if not isinstance(other, Scalar):
            return NotImplemented
        return Scalar(self.number * other.number, _merge(self.leaves, other.leaves))

    @property
    def is_one(self) -> bool:
        """Whether multiplying by it changes nothing."""
        return self.number == 1.0 and not self.leaves


ONE = Scalar()


@dataclass(frozen=True)
class Polynomial:
    """A sum of words with numeric coefficients, sorted; build it with :func:`polynomial`."""

    terms: tuple[tuple[Word, float], ...]

    def __len__(self) -> int:
        return len(self.terms)

    def __iter__(self) -> Iterator[tuple[Word, float]]:
        return iter(self.terms)

    def __hash__(self) -> int:
        # Kept by hand: polynomials are looked up so often that a cached property takes long.
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = self.__dict__["_hash"] = hash(self.terms)
        return known

    @cached_property
    def words(self) -> tuple[Word, ...]:
        """The words, without their coefficients."""
        return tuple(word for word, _ in self.terms)

    @cached_property
    def size(self) -> int:
        """Factors in all words, the identity among them: more than in what a step makes it from."""
        return sum(len(word.factors) or 1 for word, _ in self.terms)

    @cached_property
    def leaves(self) -> frozenset[int]:
        """The matrix leaves it mentions."""
        return frozenset(f.leaf for word, _ in self.terms for f in word.factors)

    @cached_property
    def scalar_leaves(self) -> frozenset[int]:
        """The scalar leaves it mentions."""
        return frozenset(s for word, _ in self.terms for s in word.scalars)

    @cached_property
    def T(self) -> Polynomial:
        """The transposed polynomial."""
        return _transposed(self)

    @cached_property
    def is_diagonal(self) -> bool:
        """Whether it is a diagonal matrix."""
        return all(f.diagonal for word, _ in self.terms for f in word.factors)

    @cached_property
    def is_diag_part(self) -> bool:
        """Whether it is the diagonal of a sum of products, as a vector."""
        return bool(self.terms) and all(word.diag_part for word in self.words)

    @cached_property
    def diag_part(self) -> Polynomial:
        """The vector that is its diagonal."""
        return polynomial((word._replace(diag_part=True), c) for word, c in self.terms)

    @cached_property
    def matrix(self) -> Polynomial:
        """The matrix whose diagonal it is."""
        return polynomial((word._replace(diag_part=False), c) for word, c in self.terms)

    @cached_property
    def scattering(self) -> int | None:
        """The assignment by which all words are scattered; None if not all are, or by several."""
        found = {word.scattered for word in self.words}
        return next(iter(found))[0] if len(found) == 1 and found != {()} else None

    @cached_property
    def is_partly_scattered(self) -> bool:
        """Whether some words are scattered, but not all of them by one assignment."""
        return self.scattering is None and any(word.scattered for word in self.words)

    def scattered(self, assignment: int) -> Polynomial:
        """The sums over the tokens of each expert.

        Raises:
            NotInNormalForm: If a word is scattered already.
        """
        if any(word.scattered for word in self.words):
            raise NotInNormalForm("a scattered word cannot be scattered again")
        return polynomial((word._replace(scattered=(assignment,)), c) for word, c in self.terms)

    @cached_property
    def unscattered(self) -> Polynomial:
        """The matrices of the tokens, before they are added up by expert."""
        return polynomial((word._replace(scattered=()), c) for word, c in self.terms)

    @property
    def unmirrored(self) -> Polynomial:
        """The same with one spelling for every vector: that of L R is that of R' L'."""
        return polynomial(
            (min(word, word.mirrored) if word.diag_part else word, c) for word, c in self.terms
        )

    @cached_property
    def shown(self) -> Factors:
        """The factors of the first word that has some: they show the polynomial's extents."""
        return next((w.factors for w in self.words if w.factors), ())

    @cached_property
    def leaf(self) -> Factor | None:
        """The factor that it is, if it is a single leaf up to a scalar."""
        if len(self.terms) != 1:
            return None
        word = self.terms[0][0]
        is_alone = len(word.factors) == 1 and not word.diag_part and not word.scattered
        return word.factors[0] if is_alone else None

    def __add__(self, other: Polynomial) -> Polynomial:
        return polynomial([*self.terms, *other.terms])

    def __sub__(self, other: Polynomial) -> Polynomial:
        return polynomial([*self.terms, *((word, -c) for word, c in other.terms)])

    def __matmul__(self, other: Polynomial) -> Polynomial:
        return polynomial((u @ v, a * b) for u, a in self.terms for v, b in other.terms)

    def scaled(self, by: Scalar) -> Polynomial:
        """The polynomial times a scalar."""
        if by.is_one:
            return self
        return polynomial(
            (word._replace(scalars=_merge(word.scalars, by.leaves)), c * by.number)
            for word, c in self.terms
        )

    def close_to(self, other: Polynomial, rtol: float = 1e-9) -> bool:
        """Whether both have the same words, with coefficients equal up to rounding."""
        mine, theirs = dict(self.terms), dict(other.terms)
        return mine.keys() == theirs.keys() and all(
            abs(c - theirs[word]) <= rtol * max(abs(c), abs(theirs[word]))
            for word, c in mine.items()
        )


def polynomial(terms: Iterable[tuple[Word, float]]) -> Polynomial:
    """The normal form of a sum: like words added, zeros dropped, words sorted."""
    total: dict[Word, float] = {}
    for word, c in terms:
        total[word] = total.get(word, 0.0) + c
    if len(total) == 1:  # most are: nothing to compare or to sort
        ((word, c),) = total.items()
        return Polynomial(((word, c),) if abs(c) > 1e-14 * abs(c) else ())
    scale = max((abs(c) for c in total.values()), default=0.0)
    kept = [(w, c) for w, c in total.items() if abs(c) > 1e-14 * scale]
    return Polynomial(tuple(sorted(kept, key=lambda term: term[0].sort_key())))


def leaf(index: int, *, diagonal: bool = False) -> Polynomial:
    """The polynomial that is one leaf."""
    return of_factors((Factor(index, diagonal=diagonal),))


def of_factors(factors: Factors) -> Polynomial:
    """The polynomial that is one word with coefficient 1."""
    return Polynomial(((Word(factors), 1.0),))


#: The identity matrix: the empty word. It vanishes in products.
IDENTITY = of_factors(())


def divided(p: Polynomial, by: Scalar) -> Polynomial:
    """The polynomial over a scalar whose leaves all its words contain."""
    common = Counter(by.leaves)
    if not common:  # the words stay what they are, and sorted
        return polynomial([(w, _rounded(c / by.number)) for w, c in p.terms])
    return polynomial(
        (
            w._replace(scalars=tuple(sorted((Counter(w.scalars) - common).elements()))),
            _rounded(c / by.number),
        )
        for w, c in p.terms
    )


class Normalised(NamedTuple):
    """``polynomial = scalar * (core.T if transposed else core)``, with one core per value."""

    scalar: Scalar
    transposed: bool
    core: Polynomial


@lru_cache(maxsize=1 << 16)
def without_scalar(p: Polynomial) -> tuple[Scalar, Polynomial]:
    """Split off the leading word's number and the scalar leaves common to all words.

    Raises:
        ValueError: If the polynomial is zero.
    """
    if not p.terms:
        raise ValueError("the zero polynomial has no leading word")
    common = Counter(p.terms[0][0].scalars)
    if common:
        for word, _ in p.terms[1:]:
            common &= Counter(word.scalars)
    # Common scalars first: which word leads may depend on them.
    core = divided(p, Scalar(1.0, tuple(sorted(common.elements())))) if common else p
    number = core.terms[0][1]
    core = divided(core, Scalar(number))  # also by 1: that rounds
    return Scalar(number, tuple(sorted(common.elements()))), core


@lru_cache(maxsize=1 << 16)
def normalise(p: Polynomial) -> Normalised:
    """The value behind a polynomial, up to scalar and transpose: what needs computing only once."""
    scalar, core = without_scalar(p)
    scalar_t, core_t = without_scalar(p.T)
    keys = [[w.sort_key() for w in q.words] for q in (core, core_t)]
    if keys[1] < keys[0]:
        return Normalised(scalar_t, True, core_t)
    return Normalised(scalar, False, core)


def substitute(
    p: Polynomial,
    leaves: Mapping[int, int],
    scalars: Mapping[int, int],
    assignments: Mapping[int, int] | None = None,
) -> Polynomial:
    """Rename the leaves, and the assignments unless they keep their numbers."""
    return polynomial(
        (
            Word(
                _renamed(w.factors, leaves),
                tuple(sorted(scalars[s] for s in w.scalars)),
                w.diag_part,
                w.scattered if assignments is None else tuple(assignments[k] for k in w.scattered),
            ),
            c,
        )
        for w, c in p.terms
    )


@lru_cache(maxsize=1 << 16)
def _transposed(p: Polynomial) -> Polynomial:
    return polynomial((word.T, c) for word, c in p.terms)


def _joined(a: Factors, b: Factors) -> Factors:
    """Two products behind one another; diagonal matrices commute, and stand sorted."""
    if not (a and b and a[-1].diagonal and b[0].diagonal):
        return a + b
    i, j = len(a), 0
    while i and a[i - 1].diagonal:
        i -= 1
    while j < len(b) and b[j].diagonal:
        j += 1
    return (*a[:i], *sorted(a[i:] + b[:j]), *b[j:])


def _renamed(factors: Factors, leaves: Mapping[int, int]) -> Factors:
    own = tuple([Factor(leaves[f.leaf], f.transposed, f.diagonal) for f in factors])
    if not any([f.diagonal for f in factors]):
        return own
    renamed: Factors = ()
    for factor in own:
        renamed = _joined(renamed, (factor,))
    return renamed


def _merge(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(a + b)) if a and b else a or b


def _rounded(c: float) -> float:
    return float(f"{c:.{_DIGITS}g}")
