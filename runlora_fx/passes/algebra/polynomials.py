"""Matrix polynomials: the normal form in which linear algebra is read, planned and proven.

A *factor* is a leaf matrix, its transpose, or the diagonal matrix of a leaf vector. A *word* is a
product of factors. A *polynomial* is a sum of words with coefficients. A coefficient is a number
times a product of *scalar leaves*: 0-d tensors and symbols whose value is known at run time.

Before -> after: ``(A B)' C + (D + D) C`` -> ``B' A' C + 2 D C``. Products are expanded over sums,
transposes are pushed to the leaves, and like words are added.

The gradient of a vector that scales rows or columns is the *diagonal part* of a product: the vector
``sum(L * R', 1)``, which is the diagonal of ``L R``. It is a word of its own kind. Its product
can be evaluated in any order: ``diag_part(dY' (X A' B')) = diag_part((dY' X A') B')``.

A word may also be *scattered*: an assignment gives each of T tokens one of E experts, and the word
is a batch of E matrices, each the sum over its tokens. Its factors are those of the T matrices: see
:mod:`runlora_fx.passes.algebra.assignments`.

Invariant: two expressions are the same function of their leaves if and only if their polynomials
are equal. Leaves are integers; nothing here depends on torch, shapes or costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import copysign, inf, sqrt
from typing import NamedTuple

from runlora_fx.passes.algebra.cached import cached
from runlora_fx.passes.algebra.words import Factor, Factors, NotInNormalForm, Word, in_order, merge

#: Significant digits of a coefficient after a sum is divided by a scalar. They are enough for fp64,
#: and few enough that 0.7 (P + Q / 3) and 0.5 (P + Q / 3) become the same sum.
_DIGITS = 13

#: A coefficient is rounded to a fraction with at most this denominator, if it is this near.
_DENOMINATOR, _TOLERANCE = 10_000, 1e-13

#: Smaller numbers, and numbers larger than its inverse, are not rounded to fractions.
_SMALLEST = 1e-100


class Scalar(NamedTuple):
    """A number times a monomial of scalar leaves."""

    number: float = 1.0
    leaves: tuple[int, ...] = ()

    def __mul__(self, other: object) -> Scalar:
        """The product of two scalars."""
        if not isinstance(other, Scalar):
            return NotImplemented
        return Scalar(self.number * other.number, merge(self.leaves, other.leaves))

    @property
    def is_one(self) -> bool:
        """True if multiplying by it changes nothing."""
        return self.number == 1.0 and not self.leaves


ONE = Scalar()


@dataclass(frozen=True)
class Polynomial:
    """A sorted sum of words with numeric coefficients. :func:`polynomial` makes one."""

    terms: tuple[tuple[Word, float], ...]

    def __len__(self) -> int:
        return len(self.terms)

    def __iter__(self) -> Iterator[tuple[Word, float]]:
        return iter(self.terms)

    def __hash__(self) -> int:
        # Stored by hand, because a cached property is too slow for this many look-ups.
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = self.__dict__["_hash"] = hash(self.terms)
        return known

    @cached
    def words(self) -> tuple[Word, ...]:
        """The words, without their coefficients."""
        return tuple(word for word, _ in self.terms)

    @cached
    def size(self) -> int:
        """The number of factors in all words, with the identity counted as one."""
        return sum(len(word.factors) or 1 for word, _ in self.terms)

    @cached
    def leaves(self) -> frozenset[int]:
        """The numbers of its matrix leaves."""
        return frozenset(f.leaf for word, _ in self.terms for f in word.factors)

    @cached
    def scalar_leaves(self) -> frozenset[int]:
        """The numbers of its scalar leaves."""
        return frozenset(s for word, _ in self.terms for s in word.scalars)

    @cached
    def T(self) -> Polynomial:
        """The transposed polynomial."""
        return _transposed(self)

    @cached
    def is_diagonal(self) -> bool:
        """True if it is a diagonal matrix."""
        return all(f.diagonal for word, _ in self.terms for f in word.factors)

    @cached
    def is_diag_part(self) -> bool:
        """True if it is the diagonal of a sum of products, as a vector."""
        return bool(self.terms) and all(word.diag_part for word in self.words)

    @cached
    def diag_part(self) -> Polynomial:
        """The vector that is its diagonal."""
        return _mapped(self, lambda word: word._replace(diag_part=True))

    @cached
    def matrix(self) -> Polynomial:
        """The matrix whose diagonal it is."""
        return _mapped(self, lambda word: word._replace(diag_part=False))

    @cached
    def scattering(self) -> int | None:
        """The assignment by which all words are scattered; None if not all are, or by several."""
        found = {word.scattered for word in self.words}
        return next(iter(found))[0] if len(found) == 1 and found != {()} else None

    @cached
    def is_partly_scattered(self) -> bool:
        """True if some words are scattered, but not all of them by one assignment."""
        return self.scattering is None and any(word.scattered for word in self.words)

    def scattered(self, assignment: int) -> Polynomial:
        """The sums over the tokens of each expert.

        Raises:
            NotInNormalForm: If a word is scattered already.
        """
        if any(word.scattered for word in self.words):
            raise NotInNormalForm("a scattered word cannot be scattered again")
        return _mapped(self, lambda word: word._replace(scattered=(assignment,)))

    @cached
    def unscattered(self) -> Polynomial:
        """The matrices of the tokens, before they are added up by expert."""
        return _mapped(self, lambda word: word._replace(scattered=()))

    @property
    def unmirrored(self) -> Polynomial:
        """Diagonal parts in one spelling, because the diagonals of L R and R' L' are equal."""
        return _mapped(self, lambda word: min(word, word.mirrored) if word.diag_part else word)

    @cached
    def shown(self) -> Factors:
        """The factors of the first word that has any. Its ends have the sizes of the polynomial."""
        return next((w.factors for w in self.words if w.factors), ())

    @cached
    def leaf(self) -> Factor | None:
        """Its factor, if it is a single leaf times a scalar; None otherwise."""
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
        if len(self.terms) == len(other.terms) == 1:
            ((u, a),), ((v, b),) = self.terms, other.terms
            return Polynomial(((u @ v, a * b),))
        return polynomial((u @ v, a * b) for u, a in self.terms for v, b in other.terms)

    def scaled(self, by: Scalar) -> Polynomial:
        """The polynomial times a scalar."""
        if by.is_one:
            return self
        if not by.leaves and 0.0 < abs(by.number) < inf:  # the words stay as they are, and sorted
            return Polynomial(tuple((word, c * by.number) for word, c in self.terms))
        return polynomial(
            (word._replace(scalars=merge(word.scalars, by.leaves)), c * by.number)
            for word, c in self.terms
        )

    def close_to(self, other: Polynomial, rtol: float = 1e-9) -> bool:
        """True if both have the same words, with coefficients equal up to rounding."""
        mine, theirs = dict(self.terms), dict(other.terms)
        return mine.keys() == theirs.keys() and all(
            abs(c - theirs[word]) <= rtol * max(abs(c), abs(theirs[word]))
            for word, c in mine.items()
        )


def polynomial(terms: Iterable[tuple[Word, float]]) -> Polynomial:
    """The normal form of a sum: equal words combined, zeros dropped, words sorted."""
    total: dict[Word, float] = {}
    for word, c in terms:
        total[word] = total.get(word, 0.0) + c
    if len(total) == 1:  # the most common case: nothing to compare or sort
        ((word, c),) = total.items()
        return Polynomial(((word, c),) if abs(c) > 1e-14 * abs(c) else ())
    scale = max((abs(c) for c in total.values()), default=0.0)
    kept = [(w, c) for w, c in total.items() if abs(c) > 1e-14 * scale]
    return Polynomial(tuple(sorted(kept, key=lambda term: term[0].sort_key())))


def _mapped(p: Polynomial, to: Callable[[Word], Word]) -> Polynomial:
    """The sum with every word replaced."""
    if len(p.terms) == 1:  # the most common case: one word stays one word
        ((word, c),) = p.terms
        return Polynomial(((to(word), c),))
    return polynomial((to(word), c) for word, c in p.terms)


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
        return Polynomial(tuple([(w, _rounded(c / by.number)) for w, c in p.terms]))
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
    for word, _ in p.terms[1:] if common else ():
        common &= Counter(word.scalars)
    leaves = tuple(sorted(common.elements()))
    # Common scalars first: which word leads may depend on them.
    core = divided(p, Scalar(1.0, leaves)) if leaves else p
    number = core.terms[0][1]
    return Scalar(number, leaves), divided(core, Scalar(number))  # also by 1: that rounds


@lru_cache(maxsize=1 << 16)
def normalise(p: Polynomial) -> Normalised:
    """The value of a polynomial, up to a scalar and a transpose. It is computed only once."""
    if len(p.terms) == 1:
        return _normalised_word(p)
    scalar, core = without_scalar(p)
    scalar_t, core_t = without_scalar(p.T)
    keys = [[w.sort_key() for w in q.words] for q in (core, core_t)]
    if keys[1] < keys[0]:
        return Normalised(scalar_t, True, core_t)
    return Normalised(scalar, False, core)


def _normalised_word(p: Polynomial) -> Normalised:
    """The value of a polynomial of one word, as :func:`normalise` but faster."""
    ((word, c),) = p.terms
    if word.scalars:
        word, scalar = word._replace(scalars=()), Scalar(_rounded(c), word.scalars)
    else:
        scalar = Scalar(c)
    is_turned = _is_turned(word)
    if scalar.is_one:
        return Normalised(scalar, is_turned, p.T if is_turned else p)
    return Normalised(scalar, is_turned, Polynomial(((word.T if is_turned else word, 1.0),)))


def _is_turned(word: Word) -> bool:
    """True if the transpose of a word comes before it."""
    if word.factors:
        first, last = word.factors[0], word.factors[-1]
        if not (first.diagonal or last.diagonal or first.leaf == last.leaf):
            return last.leaf < first.leaf and not word.diag_part
    return word.T.factors < word.factors


def substitute(
    p: Polynomial,
    leaves: Mapping[int, int],
    scalars: Mapping[int, int],
    assignments: Mapping[int, int] | None = None,
    *,
    keeps_order: bool = False,
) -> Polynomial:
    """Rename the leaves, and the assignments unless they keep their numbers.

    Args:
        p: The polynomial.
        leaves: By number, the new number of a leaf.
        scalars: The same for scalar leaves.
        assignments: The same for assignments.
        keeps_order: True if a greater number has a greater new one, so that words stay sorted.
    """

    def renamed(w: Word) -> Word:
        own = tuple(sorted([scalars[s] for s in w.scalars])) if w.scalars else ()
        scattered = w.scattered
        if scattered and assignments is not None:
            scattered = tuple(assignments[k] for k in scattered)
        factors = tuple([Factor(leaves[f.leaf], f.transposed, f.diagonal) for f in w.factors])
        return Word(in_order(factors), own, w.diag_part, scattered)

    if keeps_order:
        return Polynomial(tuple([(renamed(word), c) for word, c in p.terms]))
    return _mapped(p, renamed)


@lru_cache(maxsize=1 << 16)
def _transposed(p: Polynomial) -> Polynomial:
    return _mapped(p, lambda word: word.T)


@lru_cache(maxsize=1 << 14)
def _rounded(c: float) -> float:
    """A coefficient without the rounding error of earlier multiplications and divisions.

    A number close to a fraction, or to the square root of one, becomes the double next to it. So
    ``(1/2) / (1/6)`` is exactly 3.
    """
    size = abs(c)
    for power in (1, 2) if _SMALLEST < size < 1 / _SMALLEST else ():
        inverted = size < 1
        sought = (1 / size if inverted else size) ** power
        near = Fraction(sought).limit_denominator(_DENOMINATOR)
        if abs(near - sought) <= power * _TOLERANCE * sought:
            exact = float(1 / near if inverted else near)
            return copysign(exact if power == 1 else sqrt(exact), c)
    return float(f"{c:.{_DIGITS}g}")
