"""Readers of convolutions without groups.

Example: ``aten.convolution(x, w, b, ...)`` is ``P W' + 1 b'`` for the patches P of the images.

Invariant: channels are known numbers. A spatial size is too, or the step along it is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from runlora_fx.passes.levels.cuts import IMAGES
from runlora_fx.passes.levels.forms import Form, Operand, WeightedSum
from runlora_fx.passes.levels.forms.convolutions import (
    WEIGHT,
    BiasOfChannels,
    Convolution,
    GradientOfImages,
    GradientOfWeight,
)
from runlora_fx.passes.levels.geometry import Geometry
from runlora_fx.passes.levels.sizes import example_of, shape_of

_BACKWARD = torch.ops.aten.convolution_backward.default


def convolution(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: Any,
    output_padding: Any,
    groups: Any,
) -> Form | None:
    """A convolution, or a transposed one: the same operator as the gradient of the images."""
    if groups != 1 or not _is_known(x, weight):
        return None
    if transposed:
        geometry = _geometry(weight, stride, padding, dilation, output_padding)
        if geometry is None or bias is not None or not geometry.ends_at(_spatial(x)):
            return None
        return GradientOfImages(Operand(x, IMAGES), Operand(weight, WEIGHT), geometry)
    geometry = _of_images(x, weight, stride, padding, dilation)
    if geometry is None:
        return None
    form = Convolution(Operand(x, IMAGES), Operand(weight, WEIGHT), geometry)
    return form if bias is None else WeightedSum.of((form, 1.0), (BiasOfChannels(bias), 1.0))


def result(pair: Any, i: Any) -> Form | None:
    """A result of the backward of a convolution: the gradient of the images or of the weight."""
    if not isinstance(pair, fx.Node) or pair.target is not _BACKWARD or pair.kwargs:
        return None
    args: tuple[Any, ...] = pair.args
    gradient, x, weight, _, stride, padding, dilation, transposed, _, groups, _ = args
    if transposed or groups != 1 or not _is_known(gradient, x, weight) or i not in (0, 1):
        return None
    geometry = _of_images(x, weight, stride, padding, dilation)
    if geometry is None:
        return None
    by = Operand(gradient, IMAGES)
    if i == 0:
        return GradientOfImages(by, Operand(weight, WEIGHT), geometry, (pair,))
    return GradientOfWeight(by, Operand(x, IMAGES), geometry, (pair,))


def _of_images(x: Any, weight: Any, stride: Any, padding: Any, dilation: Any) -> Geometry | None:
    """The geometry of a convolution of images; None if it depends on unknown sizes."""
    geometry = _geometry(weight, stride, padding, dilation, [0] * len(_spatial(x)))
    sizes = _spatial(x)
    if geometry is None or not geometry.knows(sizes):
        return None
    reached = geometry.images(geometry.results(sizes))
    ends = zip(sizes, reached, strict=True)
    rest = [size - end if isinstance(size, int) else 0 for size, end in ends]
    return geometry._replace(left_over=tuple(rest))


def _geometry(
    weight: Any, stride: Any, padding: Any, dilation: Any, left_over: Any
) -> Geometry | None:
    """The geometry of a weight, if every dimension has its numbers, and they are known."""
    kernel = _spatial(weight)
    numbers = [tuple(given) for given in (stride, padding, dilation, left_over)]
    is_whole = all(len(given) == len(kernel) for given in numbers)
    is_known = all(isinstance(n, int) for given in (shape_of(weight), *numbers) for n in given)
    return Geometry(kernel, *numbers) if is_whole and is_known else None


def _spatial(node: Any) -> Any:
    return shape_of(node)[2:]


def _is_known(*nodes: Any) -> bool:
    """True if all are images or weights, of one rank and of known numbers of channels."""
    ranks = {None if (val := example_of(node)) is None else val.dim() for node in nodes}
    if len(ranks) != 1 or not ranks.issubset((3, 4, 5)):
        return False
    return all(isinstance(shape_of(node)[1], int) for node in nodes)
