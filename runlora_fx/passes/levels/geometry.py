"""Geometry: how a convolution moves over images, and the leaves that depend on it.

Example: ``conv2d(x, w, padding=1)`` is ``P W'``, with the patches of ``x`` as rows of ``P``. No
node holds ``P``, and no plan writes it: one operator multiplies by it, whatever ``W`` is.

The gradient of ``x`` is the *fold* of ``dY W``: overlapping patches are added up. No node holds
``dY W`` either. So the kernels that make folds are leaves of their own, one for each geometry.

Invariant: convolutions of equal geometry differ in images and kernels alone.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from math import prod
from typing import ClassVar, NamedTuple

import torch
from torch import fx

from runlora_fx.passes.levels.origins import Held, LeafWriter, Numbers
from runlora_fx.passes.levels.sizes import Shape


class Geometry(NamedTuple):
    """How a convolution without groups moves over images; one number for each spatial dimension.

    Attributes:
        kernel: The size of the kernel [elements].
        stride: The step from patch to patch.
        padding: The zeros in front of the image, and behind it.
        dilation: The distance of a patch's elements.
        left_over: The elements at the end of the padded image that no patch reaches.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    left_over: tuple[int, ...]

    @property
    def taps(self) -> int:
        """The elements of a patch of one channel."""
        return prod(self.kernel)

    @property
    def is_pointwise(self) -> bool:
        """True if the patches are the positions of the image."""
        steps = zip(self.kernel, self.stride, self.padding, strict=True)
        return all(step == (1, 1, 0) for step in steps)

    def results(self, image: Shape) -> Shape:
        """The spatial sizes of the result for those of an image."""
        return tuple(
            (size + 2 * p - d * (k - 1) - 1) // s + 1 if s > 1 else size + 2 * p - d * (k - 1)
            for size, k, s, p, d in zip(image, *self[:4], strict=True)
        )

    def images(self, result: Shape) -> Shape:
        """The spatial sizes of the image for those of a result."""
        return tuple(
            (size - 1) * s - 2 * p + d * (k - 1) + 1 + rest
            for size, k, s, p, d, rest in zip(result, *self, strict=True)
        )

    def ends_at(self, result: Shape) -> bool:
        """True if images of the sizes :meth:`images` have a result of these sizes."""
        is_known = all(isinstance(size, int) for size in result)
        return all(rest < s for rest, s in zip(self.left_over, self.stride, strict=True)) and (
            is_known or not any(self.left_over)
        )

    def knows(self, image: Shape) -> bool:
        """True if it has a whole patch in an image, and its last step is known.

        A size may be a symbol only if the step is one.
        """
        steps = zip(image, self.stride, self.results(image), strict=True)
        return all(n >= 1 if isinstance(size, int) else s == 1 for size, s, n in steps)


@dataclass(frozen=True)
class Patches:
    """The patches of images, each as a row."""

    image: fx.Node
    geometry: Geometry

    node: ClassVar[None] = None

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The images."""
        return (self.image,)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the images."""
        return Held(self.image).dtype

    @property
    def name(self) -> str:
        """The name of the images."""
        return self.image.name

    def key(self, numbers: Numbers) -> Hashable:
        """The value of the images, and the geometry."""
        return Patches, numbers.of(self.image), self.geometry

    def write(self, writer: LeafWriter) -> fx.Node:
        """Nothing writes patches.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(f"the patches of {self.name} are no tensor")


@dataclass(frozen=True)
class KernelOf:
    """A weight as the kernel of a convolution of one geometry."""

    node: fx.Node
    geometry: Geometry

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The weight."""
        return (self.node,)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the weight."""
        return Held(self.node).dtype

    @property
    def name(self) -> str:
        """The name of the weight."""
        return self.node.name

    def key(self, numbers: Numbers) -> Hashable:
        """The value of the weight, and the geometry."""
        return KernelOf, numbers.of(self.node), self.geometry

    def write(self, writer: LeafWriter) -> fx.Node:
        """The weight; nothing is written."""
        return self.node
