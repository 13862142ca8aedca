"""Assignments: each of T tokens has one of E experts; picks and sums by expert are linear.

An assignment is an *index* ``k`` of T numbers, or the *offsets* at which the rows of each expert
end, where rows are sorted by expert. For a batch of E matrices M, ``M[k]`` is the batch of the T
matrices that the tokens have. For a batch of T matrices P, ``sum_k(P)`` is the batch of E matrices
that are the sums over each expert's tokens. Both are linear:

    (W + s L R)[k]  =  W[k] + s L[k] R[k]        M'[k]  =  M[k]'
    sum_k(P) Q      =  sum_k(P Q[k])             sum_k(P)'  =  sum_k(P')
    Q sum_k(P)      =  sum_k(Q[k] P)

Before -> after: ``(W + s L R)[k] x``, read with picks at the leaves: ``W[k] x + s L[k] R[k] x``.

Invariant: picks stand at leaves, scatters stand outside of words. A *picked leaf* is a leaf of its
own that names its base leaf. No tensor holds it until a step picks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from runlora_fx.passes.algebra.polynomials import Polynomial, polynomial


@dataclass(frozen=True)
class Assignment:
    """An assignment of tokens to experts.

    Attributes:
        kind: ``"indexed"`` if an index has the expert of each token; ``"grouped"`` if offsets have
            the ends of the experts' rows. Then no matrix is picked: one operator multiplies all
            rows by the matrices of their experts.
        tokens: Index of the number of tokens in :attr:`Problem.dims`.
        experts: Index of the number of experts.
        multiple: Grouped products take widths that are multiples of it [elements].
    """

    kind: Literal["indexed", "grouped"]
    tokens: int
    experts: int
    multiple: int = 1


class Picked(NamedTuple):
    """The definition of a picked leaf: ``base[k]``.

    Attributes:
        base: The leaf that holds a matrix for each expert.
        assignment: The assignment k.
    """

    base: int
    assignment: int


class _PickedLeaf(Protocol):
    """The part of a leaf that this module needs."""

    @property
    def picked(self) -> Picked | None:
        """Its base and assignment; None if it is no picked leaf."""


def picking(leaves: Sequence[_PickedLeaf], p: Polynomial) -> int | None:
    """The assignment by which every leaf of a polynomial is picked; None if there is none."""
    found = {leaf.picked and leaf.picked.assignment for leaf in map(leaves.__getitem__, p.leaves)}
    return next(iter(found)) if len(found) == 1 else None


def unpicked(leaves: Sequence[_PickedLeaf], p: Polynomial) -> Polynomial:
    """The polynomial M for ``M[k]``, in base leaves.

    Args:
        leaves: By leaf index.
        p: A polynomial of which every leaf is picked by the same assignment.
    """

    def base(leaf: int) -> int:
        picked = leaves[leaf].picked
        assert picked is not None
        return picked.base

    return polynomial(
        (w._replace(factors=tuple(f._replace(leaf=base(f.leaf)) for f in w.factors)), c)
        for w, c in p.terms
    )
