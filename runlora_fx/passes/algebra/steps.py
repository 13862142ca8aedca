"""Steps: the ways to make one value of a problem from others, as data.

Example: ``X M'`` is a :class:`Product` of the values ``X`` and ``M'``, and ``M`` a :class:`Sum`.

A new kind of step is one class here. It says which operands it reads, and which step makes the
transpose or a multiple of its value. Implementations and prices are in
:mod:`runlora_fx.passes.algebra.implementations`.

Invariant: a step is immutable, and it makes exactly one polynomial.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from runlora_fx.passes.algebra.polynomials import (
    Polynomial,
    Scalar,
    divided,
    normalise,
    without_scalar,
)

#: Gives a polynomial other leaf numbers.
Rename = Callable[[Polynomial], Polynomial]


class Step:
    """One way to make a value."""

    @property
    def operands(self) -> tuple[Polynomial, ...]:
        """The polynomials that the step reads."""
        return ()

    @property
    def turned(self) -> Step:
        """The step that makes the transpose."""
        return self

    def divided(self, by: Scalar) -> Step:
        """The step that makes the value over a scalar."""
        return self

    def renamed(self, rename: Rename, assignments: Mapping[int, int]) -> Step:
        """The step with other numbers of leaves and assignments."""
        return self

    def along(self, core: Polynomial) -> tuple[Polynomial, ...]:
        """The operands that have the orientation of the result: those of sums and scalings.

        Args:
            core: The value that the step makes.
        """
        return ()

    def making(self, made: Polynomial) -> Step:
        """The step that makes the normalised value of a polynomial.

        Args:
            made: What this step makes: the value up to a scalar and a transpose.
        """
        return _making(self, made)


@lru_cache(maxsize=1 << 14)
def _making(step: Step, made: Polynomial) -> Step:
    scalar, transposed, _ = normalise(made)
    return (step.turned if transposed else step).divided(scalar)


@dataclass(frozen=True)
class Keep(Step):
    """The backward uses the value that the forward computed and saved."""


@dataclass(frozen=True)
class Unpack(Step):
    """The tensor of a virtual leaf is computed: a weight that is stored in few bits."""


@dataclass(frozen=True)
class Sum(Step):
    """``core = sum(parts)``."""

    parts: tuple[Polynomial, ...]

    @property
    def operands(self) -> tuple[Polynomial, ...]:
        """The parts."""
        return self.parts

    @property
    def turned(self) -> Step:
        """The sum of the transposes."""
        return Sum(tuple(p.T for p in self.parts))

    def divided(self, by: Scalar) -> Step:
        """The sum of the parts over a scalar."""
        return Sum(tuple(divided(p, by) for p in self.parts))

    def renamed(self, rename: Rename, assignments: Mapping[int, int]) -> Step:
        """The sum with other numbers."""
        return Sum(tuple(map(rename, self.parts)))

    def along(self, core: Polynomial) -> tuple[Polynomial, ...]:
        """All parts."""
        return self.parts


@dataclass(frozen=True)
class _Bilinear(Step):
    """A step that multiplies two operands."""

    left: Polynomial
    right: Polynomial

    @property
    def operands(self) -> tuple[Polynomial, ...]:
        """Both operands."""
        return (self.left, self.right)

    @property
    def turned(self) -> Step:
        """``(L R)' = R' L'``."""
        return replace(self, left=self.right.T, right=self.left.T)

    def divided(self, by: Scalar) -> Step:
        """The product over a scalar."""
        left, right = _divided_product(self.left, self.right, by)
        return replace(self, left=left, right=right)

    def renamed(self, rename: Rename, assignments: Mapping[int, int]) -> Step:
        """The product with other numbers."""
        return replace(self, left=rename(self.left), right=rename(self.right))


@dataclass(frozen=True)
class Product(_Bilinear):
    """``core = left @ right``, or the diagonal of that where the core is a diagonal part."""

    def along(self, core: Polynomial) -> tuple[Polynomial, ...]:
        """The operand that a diagonal matrix scales."""
        if core.is_diag_part or self.left.is_diagonal == self.right.is_diagonal:
            return ()
        return (self.right,) if self.left.is_diagonal else (self.left,)


@dataclass(frozen=True)
class Accumulate(_Bilinear):
    """``core = addend + left @ right`` in one call. The product is no value of its own."""

    addend: Polynomial

    @property
    def operands(self) -> tuple[Polynomial, ...]:
        """The addend, and the factors."""
        return (self.addend, self.left, self.right)

    @property
    def turned(self) -> Step:
        """``(C + L R)' = C' + R' L'``."""
        return Accumulate(self.right.T, self.left.T, self.addend.T)

    def divided(self, by: Scalar) -> Step:
        """Addend and product over a scalar."""
        left, right = _divided_product(self.left, self.right, by)
        return Accumulate(left, right, divided(self.addend, by))

    def renamed(self, rename: Rename, assignments: Mapping[int, int]) -> Step:
        """The same with other numbers."""
        return Accumulate(rename(self.left), rename(self.right), rename(self.addend))

    def along(self, core: Polynomial) -> tuple[Polynomial, ...]:
        """The addend."""
        return (self.addend,)


# -- steps that depend on the experts of tokens ------------------------------------------------


@dataclass(frozen=True)
class _ByAssignment(Step):
    """A step that reads one value, by an assignment k of tokens to experts."""

    of: Polynomial
    assignment: int

    @property
    def operands(self) -> tuple[Polynomial, ...]:
        """The operand."""
        return (self.of,)

    @property
    def turned(self) -> Step:
        """The same of the transpose."""
        return replace(self, of=self.of.T)

    def divided(self, by: Scalar) -> Step:
        """The same of the operand over a scalar."""
        return replace(self, of=divided(self.of, by))

    def renamed(self, rename: Rename, assignments: Mapping[int, int]) -> Step:
        """The same with other numbers."""
        return replace(self, of=rename(self.of), assignment=assignments[self.assignment])


@dataclass(frozen=True)
class Pick(_ByAssignment):
    """``core = of[k]``: each token's matrix."""


@dataclass(frozen=True)
class Scatter(_ByAssignment):
    """``core = sum_k(of)``: for each expert the sum over its tokens."""


@dataclass(frozen=True)
class _Grouped(_Bilinear):
    """A product of all tokens with their experts' matrices by one operator."""

    assignment: int

    def renamed(self, rename: Rename, assignments: Mapping[int, int]) -> Step:
        """The product with other numbers."""
        k = assignments[self.assignment]
        return replace(self, left=rename(self.left), right=rename(self.right), assignment=k)


@dataclass(frozen=True)
class StackProduct(_Grouped):
    """A product of what each token has with the matrix of its expert.

    Attributes:
        left: The left operand: rows for each token, or a matrix for each expert.
        right: The right operand: a matrix for each expert, or columns for each token.
        assignment: The assignment k.
        picked: The operand that has a matrix for each expert.
    """

    picked: Literal["left", "right"]

    @property
    def turned(self) -> Step:
        """``(L R[k])' = R'[k] L'``."""
        side: Literal["left", "right"] = "left" if self.picked == "right" else "right"
        return replace(self, left=self.right.T, right=self.left.T, picked=side)


@dataclass(frozen=True)
class GroupedProduct(StackProduct):
    """``core = left @ right[k]`` for tokens of one row, or ``left[k] @ right`` for columns."""


@dataclass(frozen=True)
class ProductWithAll(StackProduct):
    """``core = (left @ right)[k]``: each token with every expert, of which its own is picked."""


@dataclass(frozen=True)
class GroupedOuter(_Grouped):
    """``core = sum_k(left @ right)``: a column times a row for each token, added up by expert."""


def _divided_product(
    left: Polynomial, right: Polynomial, by: Scalar
) -> tuple[Polynomial, Polynomial]:
    """The operands of ``left @ right`` over a scalar; the second keeps all scalars."""
    front, left = without_scalar(left)
    right = right.scaled(Scalar(front.number / by.number, front.leaves))
    return left, divided(right, Scalar(1.0, by.leaves))


def product_step(left: Polynomial, right: Polynomial) -> Product:
    """The product as a step that makes its normalised value."""
    if normalise(left @ right).transposed:
        left, right = right.T, left.T
    (_, left), (_, right) = without_scalar(left), without_scalar(right)
    again = normalise(left @ right).scalar.number
    return Product(left, right.scaled(Scalar(1.0 / again)))
