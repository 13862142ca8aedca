"""Convolutions: kernels times the patches of images, and the gradients of both.

    convolution(x, W)                      ->      P W', for the patches P of x
    convolution_backward(dY, x, W)[0]      ->      the fold of dY W
    convolution_backward(dY, x, W)[1]      ->      dY' P

Here a weight ``(o, i, kh, kw)`` is the matrix ``(o, i kh kw)``, and images are matrices with a
column for each channel (:data:`~runlora_fx.passes.levels.cuts.IMAGES`). If the kernel has one
element and moves by one, patches are positions: ``P`` is ``X``, and nothing is folded.

Invariant: the three forms of one geometry have the same kernels and the same patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from runlora_fx.passes.algebra.addends import Addends, total, transposed
from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.levels.cuts import IMAGES, Cut, fold, same_matrix
from runlora_fx.passes.levels.forms.broadcasts import Broadcast
from runlora_fx.passes.levels.forms.form import Cuts, Form, LinearNodes, Operand, Reading
from runlora_fx.passes.levels.geometry import Geometry, Patches
from runlora_fx.passes.levels.sizes import Shape, numel, shape_of

#: A weight as a matrix: a row for each channel of the result.
WEIGHT = Cut(0, 1)

#: A bias as a matrix of one row.
_ROW = Cut(0, 0)


@dataclass(frozen=True)
class _OfTwo(Form):
    """A product of two of three: kernels, images and results of a convolution.

    Attributes:
        left: The first tensor.
        right: The second tensor.
        geometry: The geometry.
        parts: A call that computes this result with others. It is absorbed.
    """

    left: Operand
    right: Operand
    geometry: Geometry
    parts: tuple[fx.Node, ...] = ()

    is_product: ClassVar[bool] = True

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """Both tensors."""
        return (self.left.node, self.right.node)

    @property
    def absorbed(self) -> tuple[fx.Node, ...]:
        """The call."""
        return self.parts

    @property
    def products(self) -> tuple[_OfTwo, ...]:
        """Itself."""
        return (self,)

    @property
    def out(self) -> Cut:
        """The cut through which the node shows the product."""
        raise NotImplementedError

    def operands(self, reading: Reading) -> tuple[Addends, Addends]:
        """Both factors."""
        raise NotImplementedError

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """The cut through which it is computed."""
        return self.out

    def reads_as_computed(self, source: fx.Node, node: fx.Node, linear: Cuts) -> bool:
        """True if both tensors are shown as they were computed; patches are leaves."""
        if source is self._patched:
            return False
        return all(f.reads_as_computed(source, linear) for f in (self.left, self.right))

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """One addend, if the cut shows the product."""
        if not same_matrix(shape, self.out, cut):
            return None
        left, right = self.operands(reading)
        return (reading.multiplied(total(left), total(right)),)

    @property
    def _patched(self) -> fx.Node | None:
        """The images of which patches are read; None if there are none."""
        return None

    def _kernels(self, weight: Operand, reading: Reading) -> Addends:
        found = weight.addends(reading)
        if self.geometry.is_pointwise:
            return found
        return tuple([reading.kernel(p, self.geometry) for p in found])

    def _patches(self, images: Operand, results: Dim, reading: Reading) -> Addends:
        if self.geometry.is_pointwise:
            return images.addends(reading)
        origin = Patches(images.node, self.geometry)
        cols = numel((shape_of(images.node)[1], self.geometry.taps))
        return (reading.patches(origin, results, cols),)


@dataclass(frozen=True)
class Convolution(_OfTwo):
    """``P W'`` of images and a weight."""

    @property
    def out(self) -> Cut:
        """Images."""
        return IMAGES

    @property
    def _patched(self) -> fx.Node | None:
        return None if self.geometry.is_pointwise else self.left.node

    def operands(self, reading: Reading) -> tuple[Addends, Addends]:
        """The patches of the images, and the transposed kernels."""
        sizes = shape_of(self.left.node)
        results = self.geometry.results(sizes[2:])
        patches = self._patches(self.left, numel((sizes[0], *results)), reading)
        return patches, transposed(self._kernels(self.right, reading))


@dataclass(frozen=True)
class GradientOfImages(_OfTwo):
    """The fold of ``dY W``."""

    @property
    def out(self) -> Cut:
        """The images, or the matrix that is folded to them."""
        if self.geometry.is_pointwise:
            return IMAGES
        _, results, _ = IMAGES.extents(shape_of(self.left.node))
        return fold(results, numel(shape_of(self.right.node)[1:]), self.geometry)

    def operands(self, reading: Reading) -> tuple[Addends, Addends]:
        """The gradient of the result, and the kernels."""
        return self.left.addends(reading), self._kernels(self.right, reading)


@dataclass(frozen=True)
class GradientOfWeight(_OfTwo):
    """``dY' P`` of the gradient of the result and of images."""

    @property
    def out(self) -> Cut:
        """A weight."""
        return WEIGHT

    @property
    def _patched(self) -> fx.Node | None:
        return None if self.geometry.is_pointwise else self.right.node

    def operands(self, reading: Reading) -> tuple[Addends, Addends]:
        """The transposed gradient of the result, and the patches of the images."""
        _, results, _ = IMAGES.extents(shape_of(self.left.node))
        patches = self._patches(self.right, results, reading)
        return transposed(self.left.addends(reading)), patches


@dataclass(frozen=True)
class BiasOfChannels(Broadcast):
    """The bias of each channel, repeated for all positions: a column of ones times a row."""

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """None: a vector makes no node linear."""
        return None

    def fits(self, shape: Shape, cut: Cut) -> bool:
        """True for images."""
        return cut == IMAGES

    def reads_as_computed(self, source: fx.Node, node: fx.Node, linear: Cuts) -> bool:
        """True if the source is seen as it was computed, as a row."""
        return self.source is not source or linear.shows(source, _ROW)

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """The column of ones times the row."""
        if cut != IMAGES:
            return None
        ones = reading.ones(cut.extents(shape)[1])
        return tuple([ones @ p for p in reading.operand(self.source, _ROW)])
