"""Laws of the normal form, on random polynomials and against numpy."""

from collections.abc import Callable
from functools import reduce
from operator import matmul

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runlora_fx.passes.algebra.factorise import components, factorisations
from runlora_fx.passes.algebra.polynomials import (
    IDENTITY,
    ONE,
    Polynomial,
    Scalar,
    divided,
    leaf,
    normalise,
    of_factors,
    polynomial,
    substitute,
    without_scalar,
)
from runlora_fx.passes.algebra.words import Factor, NotInNormalForm, Word

LEAVES, SCALARS, SIZE = 5, 2, 3
#: Leaves that stand for the diagonal matrix of a vector.
DIAGONALS = (5, 6)
ZERO = polynomial([])

often = settings(derandomize=True, deadline=None, max_examples=200)

# Sums and products of small dyadic numbers are exact, so the laws hold to the last digit.
numbers = st.sampled_from([1.0, -1.0, 2.0, -3.0, 0.5, -0.25])
indices = st.integers(0, LEAVES - 1)
scalars = st.builds(
    Scalar, numbers, st.lists(st.integers(0, SCALARS - 1), max_size=2).map(sorted).map(tuple)
)


def words(
    least: int = 0, leaves: st.SearchStrategy[int] = indices, diagonals: tuple[int, ...] = DIAGONALS
) -> st.SearchStrategy[Word]:
    """Random words of `least` to three factors."""
    factors = st.builds(Factor, leaves, st.booleans(), st.just(False))
    if diagonals:
        made = st.builds(Factor, st.sampled_from(diagonals), st.just(False), st.just(True))
        factors |= made
    monomials = st.lists(st.integers(0, SCALARS - 1), max_size=2).map(sorted).map(tuple)
    chains = st.lists(factors, min_size=least, max_size=3)
    return st.builds(
        lambda chain, scalars: reduce(matmul, (Word((f,)) for f in chain), Word((), scalars)),
        chains,
        monomials,
    )


def polynomials(
    least: int = 0, leaves: st.SearchStrategy[int] = indices, diagonals: tuple[int, ...] = DIAGONALS
) -> st.SearchStrategy[Polynomial]:
    """Random non-zero polynomials of up to four words."""
    terms = st.lists(st.tuples(words(least, leaves, diagonals), numbers), min_size=1, max_size=4)
    return terms.map(polynomial).filter(lambda p: len(p) > 0)


# -- the ring ----------------------------------------------------------------------------------


@often
@given(polynomials(), polynomials(), polynomials())
def test_polynomials_form_a_ring(p: Polynomial, q: Polynomial, r: Polynomial) -> None:
    assert p + q == q + p
    assert (p + q) + r == p + (q + r)
    assert (p @ q) @ r == p @ (q @ r)
    assert p @ (q + r) == p @ q + p @ r
    assert (p + q) @ r == p @ r + q @ r
    assert p @ IDENTITY == p == IDENTITY @ p
    assert p + ZERO == p
    assert p @ ZERO == ZERO == ZERO @ p


@often
@given(polynomials(), polynomials())
def test_transposing_reverses_products(p: Polynomial, q: Polynomial) -> None:
    assert (p @ q).T == q.T @ p.T
    assert (p + q).T == p.T + q.T
    assert p == p.T.T


@often
@given(polynomials(), polynomials(), scalars, scalars)
def test_scalars_move_freely(p: Polynomial, q: Polynomial, s: Scalar, t: Scalar) -> None:
    assert p.scaled(s) @ q == p @ q.scaled(s) == (p @ q).scaled(s)
    assert p.T.scaled(s) == p.scaled(s).T
    assert p.scaled(s).scaled(t) == p.scaled(s * t) == p.scaled(t * s)
    assert divided(p.scaled(s), s) == p


# -- zero and cancellation ---------------------------------------------------------------------


@often
@given(polynomials(), polynomials())
def test_what_cancels_is_gone(p: Polynomial, q: Polynomial) -> None:
    assert p - p == ZERO
    assert len(ZERO) == 0
    assert (p + q) - q == p
    assert p @ q - (q.T @ p.T).T == ZERO
    assert (p + q) @ (p - q) == p @ p - p @ q + q @ p - q @ q


def test_rounding_leaves_no_ghost_of_a_cancelled_word() -> None:
    a, b = leaf(0), leaf(1)
    tenths = a.scaled(Scalar(0.1)) + a.scaled(Scalar(0.2)) - a.scaled(Scalar(0.3))
    assert tenths + b == b


def test_zero_has_no_leading_word() -> None:
    with pytest.raises(ValueError, match="zero polynomial"):
        normalise(ZERO)


# -- diagonal parts of products ----------------------------------------------------------------


@often
@given(polynomials(least=1), polynomials(least=1), scalars)
def test_diagonal_parts_are_linear_and_keep_what_they_are_of(
    p: Polynomial, q: Polynomial, s: Scalar
) -> None:
    assert (p + q).diag_part == p.diag_part + q.diag_part
    assert p.scaled(s).diag_part == p.diag_part.scaled(s)
    assert p.diag_part.matrix == p
    assert p.diag_part.is_diag_part
    assert not p.is_diag_part
    assert p.diag_part != p
    assert p.diag_part.leaf is None


@often
@given(polynomials(least=1), polynomials(least=1))
def test_diagonal_parts_of_a_product_are_those_of_its_mirror_image(
    p: Polynomial, q: Polynomial
) -> None:
    assert (p @ q).diag_part.unmirrored == (q.T @ p.T).diag_part.unmirrored
    assert (p @ q).diag_part == (p @ q).diag_part.T
    assert normalise((p @ q).diag_part).transposed is False


def test_a_diagonal_part_is_multiplied_by_the_identity_alone() -> None:
    vector = (leaf(0) @ leaf(1)).diag_part
    assert IDENTITY @ vector == vector
    assert vector @ IDENTITY.scaled(Scalar(2.0)) == vector.scaled(Scalar(2.0))
    for left, right in ((leaf(0), vector), (vector, leaf(0)), (vector, vector)):
        with pytest.raises(NotInNormalForm):
            left @ right


@often
@given(polynomials(least=1), polynomials(least=1))
def test_diagonal_parts_are_factored_as_what_they_are_of(p: Polynomial, q: Polynomial) -> None:
    product = p @ q
    if not product.terms:
        return
    pairs = list(factorisations(product.diag_part))
    assert pairs == list(factorisations(product))
    for left, right in pairs:
        assert (left @ right).diag_part.close_to(product.diag_part)


# -- values: polynomials up to scalar and transpose --------------------------------------------


@often
@given(polynomials())
def test_normalising_loses_nothing(p: Polynomial) -> None:
    scalar, transposed, core = normalise(p)
    assert (core.T if transposed else core).scaled(scalar).close_to(p)
    assert normalise(core) == (ONE, False, core)
    assert without_scalar(core) == (ONE, core)


@pytest.mark.parametrize("a", [1 / 6, 1 / 3, 0.7, 16 / 8**0.5, 1e-3 / 7])
@pytest.mark.parametrize("b", [0.5, 0.3, 32 / 24**0.5])
def test_a_sum_that_is_scaled_twice_is_the_same_value(a: float, b: float) -> None:
    """``a P + b Q``, divided by b and then by what is left of a, is divided by a."""
    p, q = leaf(0), leaf(1)
    made = p.scaled(Scalar(a)) + q.scaled(Scalar(b))
    twice = divided(made, Scalar(b))
    assert normalise(twice).core == normalise(made).core
    assert divided(twice, Scalar(twice.terms[0][1])) == divided(made, Scalar(a))


@often
@given(polynomials(), scalars)
def test_one_core_for_all_scalings_and_the_transpose(p: Polynomial, s: Scalar) -> None:
    core = normalise(p).core
    assert normalise(p.T).core == core
    assert normalise(p.scaled(s)).core == core
    if p != p.T:
        assert normalise(p.T).transposed != normalise(p).transposed


# -- taking apart and putting together ---------------------------------------------------------


@often
@given(polynomials(least=1))
def test_components_add_back_and_share_no_end(p: Polynomial) -> None:
    parts = components(p)
    assert polynomial(term for part in parts for term in part) == p
    assert sum(map(len, parts)) == len(p)
    for end in (0, -1):
        ends = [{word.factors[end] for word in part.words} for part in parts]
        assert sum(map(len, ends)) == len(set().union(*ends))


@often
@given(polynomials(least=1))
def test_factorisations_multiply_back(p: Polynomial) -> None:
    for left, right in factorisations(p):
        assert (left @ right).close_to(p)
        assert all(word.factors for word in (*left.words, *right.words))


def is_small(p: Polynomial) -> bool:
    """Few words, of which no two differ in their scalars only, as in ``(1 + s) X``."""
    return len({word.factors for word in p.words}) == len(p) <= 2


@often
@given(
    polynomials(least=1, leaves=st.integers(0, 1), diagonals=(5,)).filter(is_small),
    polynomials(least=1, leaves=st.integers(2, 4), diagonals=()).filter(is_small),
)
def test_every_product_is_factored_again(left: Polynomial, right: Polynomial) -> None:
    """Whatever can be factored out is found: here nothing cancels, for no leaf is on both sides."""
    wanted = normalise(left).core
    assert any(normalise(found).core == wanted for found, _ in factorisations(left @ right))


def test_a_word_that_can_be_cut_in_two_places() -> None:
    x, a, b = map(leaf, range(3))
    pairs = list(factorisations(x @ a + x @ b @ a))
    assert (x, a + b @ a) in pairs
    assert (x + x @ b, a) in pairs


@often
@given(words(least=1))
def test_a_word_is_cut_between_any_two_factors(word: Word) -> None:
    cuts = [(len(left.words[0].factors)) for left, _ in factorisations(Polynomial(((word, 1.0),)))]
    assert cuts == list(range(1, len(word.factors)))


@often
@given(polynomials(), polynomials(), st.permutations(range(LEAVES)), st.permutations(range(2)))
def test_renaming_leaves_commutes_with_everything(
    p: Polynomial, q: Polynomial, leaves: list[int], scalar_leaves: list[int]
) -> None:
    names = {**dict(enumerate(leaves)), **dict(zip(DIAGONALS, reversed(DIAGONALS), strict=True))}
    numbers_ = dict(enumerate(scalar_leaves))

    def renamed(x: Polynomial) -> Polynomial:
        return substitute(x, names, numbers_)

    assert renamed(p @ q.T + p) == renamed(p) @ renamed(q).T + renamed(p)
    back = {new: old for old, new in names.items()}, {new: old for old, new in numbers_.items()}
    assert substitute(renamed(p), *back) == p
    assert renamed(p).leaves == {names[i] for i in p.leaves}
    assert renamed(p).scalar_leaves == {numbers_[i] for i in p.scalar_leaves}


# -- against numpy -----------------------------------------------------------------------------

Matrix = np.ndarray
_rng = np.random.default_rng(0)
MATRICES = _rng.standard_normal((LEAVES + len(DIAGONALS), SIZE, SIZE))
for _i in DIAGONALS:
    MATRICES[_i] = np.diag(_rng.standard_normal(SIZE))
VALUES = _rng.standard_normal(SCALARS)


def evaluated(p: Polynomial) -> Matrix:
    """A polynomial with `MATRICES` and `VALUES` for its leaves."""
    total = np.zeros((SIZE, SIZE))
    for word, c in p:
        product = c * np.eye(SIZE)
        for index, transposed, _ in word.factors:
            product = product @ (MATRICES[index].T if transposed else MATRICES[index])
        total += product * np.prod(VALUES[list(word.scalars)])
    return total


#: An expression as what it is in the algebra and what numpy makes of it.
Pair = tuple[Polynomial, Matrix]
Operation = Callable[..., Pair]


def _scaled(x: Pair, s: Scalar) -> Pair:
    return x[0].scaled(s), x[1] * s.number * np.prod(VALUES[list(s.leaves)])


expressions: st.SearchStrategy[Pair] = st.recursive(
    st.one_of(
        indices.map(lambda i: (leaf(i), MATRICES[i])),
        st.sampled_from(DIAGONALS).map(lambda i: (leaf(i, diagonal=True), MATRICES[i])),
        st.just((IDENTITY, np.eye(SIZE))),
    ),
    lambda below: st.one_of(
        st.tuples(below, below).map(lambda xy: (xy[0][0] @ xy[1][0], xy[0][1] @ xy[1][1])),
        st.tuples(below, below).map(lambda xy: (xy[0][0] + xy[1][0], xy[0][1] + xy[1][1])),
        st.tuples(below, below).map(lambda xy: (xy[0][0] - xy[1][0], xy[0][1] - xy[1][1])),
        st.tuples(below, scalars).map(lambda xs: _scaled(*xs)),
        below.map(lambda x: (x[0].T, x[1].T)),
    ),
    max_leaves=10,
)


@often
@given(expressions)
def test_expressions_mean_what_numpy_computes(expression: Pair) -> None:
    p, wanted = expression
    np.testing.assert_allclose(evaluated(p), wanted, rtol=1e-9, atol=1e-9)


@often
@given(expressions.filter(lambda pair: len(pair[0]) > 0))
def test_values_and_factorisations_mean_the_same(expression: Pair) -> None:
    p, wanted = expression
    scalar, transposed, core = normalise(p)
    found, _ = _scaled((core, evaluated(core.T if transposed else core)), scalar)
    found = evaluated((core.T if transposed else core).scaled(scalar))
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
    parts = sum(map(evaluated, components(p)))
    np.testing.assert_allclose(parts, wanted, rtol=1e-9, atol=1e-9)
    for left, right in factorisations(p):
        np.testing.assert_allclose(evaluated(left) @ evaluated(right), wanted, rtol=1e-9, atol=1e-9)


@often
@given(polynomials(), polynomials())
def test_different_polynomials_are_different_functions(p: Polynomial, q: Polynomial) -> None:
    """The normal form decides equality; on random matrices only equal ones agree."""
    assert (p == q) == np.allclose(evaluated(p), evaluated(q), rtol=1e-10, atol=1e-10)


def test_lora_in_normal_form() -> None:
    """``2 (W + B A)' X'`` transposed: the base weight leads, with coefficient 1."""
    x, w, a, b = map(leaf, range(4))
    merged = (w + (b @ a).scaled(Scalar(2.0))).T
    scalar, transposed, core = normalise((x @ merged).scaled(Scalar(3.0)).T)
    assert scalar == Scalar(3.0)
    assert (core.T if transposed else core) == (x @ merged).T
    shared = {normalise(part).core for pair in factorisations(core) for part in pair}
    assert normalise(merged).core in shared
    assert of_factors((Factor(0),)) == x
