"""Images: values whose rows are the positions of images, and products with them.

Example: in ``Y = P (W + s B A)'`` the patches P of images have positions as rows, and so has Y. Its
product with the merged kernel is one convolution.

Neither patches nor folds, such as ``dY W``, are tensors: one operator multiplies patches, and one
multiplies and folds. So no step makes patches, and none multiplies a fold.

Invariant: whether a value has positions as rows does not depend on the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.steps import Product, Step


class _Leaf(Protocol):
    """The part of a leaf that this module needs."""

    @property
    def images(self) -> bool:
        """True if its rows are positions."""

    @property
    def taps(self) -> int:
        """The elements of a patch, or of a kernel that multiplies patches; else 0."""


def has_positions(leaves: Sequence[_Leaf], p: Polynomial) -> bool:
    """True if the rows of a polynomial are the positions of images."""
    starts = (word.factors[0] for word in p.words if word.factors)
    return any([leaves[f.leaf].images and not f.transposed for f in starts])


def are_images(leaves: Sequence[_Leaf], p: Polynomial) -> bool:
    """True if the rows of a polynomial, or of its transpose, are positions."""
    return has_positions(leaves, p) or has_positions(leaves, p.T)


def is_fold(leaves: Sequence[_Leaf], p: Polynomial) -> bool:
    """True if a polynomial is a matrix of which images are the fold."""
    if not has_positions(leaves, p):
        return False
    ends = (word.factors[-1] for word in p.words if word.factors)
    return any([leaves[f.leaf].taps and not (f.transposed or leaves[f.leaf].images) for f in ends])


def is_patches(leaves: Sequence[_Leaf], p: Polynomial) -> bool:
    """True if a polynomial is a multiple of patches."""
    factor = p.leaf
    if factor is None or factor.transposed:
        return False
    leaf = leaves[factor.leaf]
    return leaf.images and leaf.taps > 0


def patch_size(leaves: Sequence[_Leaf], p: Polynomial) -> int:
    """The elements of a patch of one channel, where a polynomial is patches or a fold; else 1."""
    for shown in (p, p.T):
        if is_patches(leaves, shown) or is_fold(leaves, shown):
            ends = (word.factors[-1] for word in shown.words if word.factors)
            return max(leaves[end.leaf].taps for end in ends)
    return 1


def is_convolution(leaves: Sequence[_Leaf], left: Polynomial, right: Polynomial) -> bool:
    """True if a product has images as operands."""
    return are_images(leaves, left) or are_images(leaves, right)


def is_written(leaves: Sequence[_Leaf], step: Step) -> bool:
    """False if a step multiplies a fold, or reads patches other than to multiply them."""
    refused = is_fold if isinstance(step, Product) else is_patches
    return not any(refused(leaves, shown) for p in step.operands for shown in (p, p.T))
