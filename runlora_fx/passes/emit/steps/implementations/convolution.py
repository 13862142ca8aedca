"""Convolutions: kernels times images, and sums over the positions of two images.

    P (W + s B A)'          ->      convolution(x, view(addmm(W, B, A), [o, i, kh, kw]), ...)
    dY (W + s B A)          ->      convolution(dy, view(addmm(...), ...), ..., transposed=True)
    dY' P                   ->      convolution_backward(dy, x, ...)[1]
    Z B', dY' Z             ->      the same for a kernel of one element

Invariant: a node of images is written in the shape ``(n, c, h, w)``, whether the plan reads it as
``(n h w, c)`` or as the transpose.
"""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

from runlora_fx.passes.algebra.images import has_positions
from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar, normalise
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Product, Step
from runlora_fx.passes.emit.steps.registry import Emission, writes
from runlora_fx.passes.emit.steps.scope import Scope
from runlora_fx.passes.levels.geometry import Geometry, KernelOf, Patches
from runlora_fx.passes.levels.sizes import Shape, numel, same_shape, shape_of

_aten = torch.ops.aten


@writes("convolution")
def write(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Write images that a kernel makes, or a weight's gradient, or its transpose."""
    assert isinstance(step, Product)
    leaves = emission.scope.leaves.matrices
    left, right = step.left, step.right
    if has_positions(leaves, left):
        return _images(emission, value, left, right)
    if has_positions(leaves, right.T):
        return _images(emission, value, right.T, left.T)
    return _summed(emission, value, left, right, transposed)


def _images(emission: Emission, value: Value, images: Polynomial, by: Polynomial) -> fx.Node:
    """Images, patches, or the gradient of what patches were multiplied to, times a kernel."""
    scope = emission.scope
    x, scalar, geometry = _shown(emission, images, value)
    folding = _folding(scope, by)
    weight, factor = emission.values.operand(by.T if folding is None else by, value.backward)
    rows, cols = shape_of(weight)
    made = folding or geometry
    weight = scope.writer.reshape(
        scope.writer.cast(weight, scope.dtype(value)), (rows, _channels(cols, made), *made.kernel)
    )
    scalar = scalar * factor
    out = numel((shape_of(x)[0], rows, *shape_of(x)[2:]))
    is_small = scope.hint(numel(shape_of(weight))) < scope.hint(out)
    if is_small:
        weight = scope.scaled(weight, scalar)
    rest = [0] * len(made.kernel) if folding is None else list(folding.left_over)
    node = scope.writer.call(
        _aten.convolution.default, x, weight, None, *_steps(made), folding is not None, rest, 1
    )
    return node if is_small else scope.scaled(node, scalar)


def _summed(
    emission: Emission, value: Value, left: Polynomial, right: Polynomial, transposed: bool
) -> fx.Node:
    """The sum over positions: a row for each channel of one, a column for each of the other."""
    scope = emission.scope
    is_turned = _patches(scope, left) is not None
    if is_turned:
        left, right = right.T, left.T
    y, by_y, _ = _shown(emission, left.T, value)
    x, by_x, geometry = _shown(emission, right, value)
    channels = (shape_of(y)[1], shape_of(x)[1])
    weight = _like(scope, (*channels, *geometry.kernel))
    steps, rest = _steps(geometry), [0] * len(geometry.kernel)
    mask = [False, True, False]
    call = (y, x, weight, None, *steps, False, rest, 1, mask)
    both = scope.writer.call(_aten.convolution_backward.default, *call)
    node = scope.writer.call(getitem, both, 1)
    node = scope.writer.reshape(node, (channels[0], numel((channels[1], geometry.taps))))
    node = scope.scaled(node, by_y * by_x)
    return node if is_turned == transposed else scope.writer.transpose(node)


def _shown(emission: Emission, p: Polynomial, value: Value) -> tuple[fx.Node, Scalar, Geometry]:
    """The images of a polynomial, what they are multiplied by, and how a kernel moves over them."""
    scope, patches = emission.scope, _patches(emission.scope, p)
    if patches is not None:
        node, scalar, geometry = patches.image, normalise(p).scalar, patches.geometry
    else:
        node, scalar = emission.values.operand(p, value.backward)
        ones = (1,) * (len(shape_of(node)) - 2)
        zeros = (0,) * len(ones)
        geometry = Geometry(ones, ones, zeros, ones, zeros)
    return scope.writer.cast(node, scope.dtype(value)), scalar, geometry


def _patches(scope: Scope, p: Polynomial) -> Patches | None:
    """The patches that a polynomial is a multiple of; None if it is anything else."""
    factor = p.leaf
    origin = None if factor is None else scope.leaves.matrices[factor.leaf].origin
    return origin if isinstance(origin, Patches) else None


def _folding(scope: Scope, by: Polynomial) -> Geometry | None:
    """The geometry by which a product with kernels is folded; None if it is not."""
    for word in by.words:
        origin = scope.leaves.matrices[word.factors[-1].leaf].origin
        if not word.factors[-1].transposed and isinstance(origin, KernelOf):
            return origin.geometry
    return None


def _channels(cols: object, geometry: Geometry) -> int:
    assert isinstance(cols, int), "the sizes of weights are known"
    return cols // geometry.taps


def _steps(geometry: Geometry) -> tuple[list[int], list[int], list[int]]:
    return list(geometry.stride), list(geometry.padding), list(geometry.dilation)


def _like(scope: Scope, shape: Shape) -> fx.Node:
    """A weight of a shape, whose numbers are not read: a leaf, or zeros."""
    for leaf in scope.leaves.matrices:
        node = leaf.node
        if node is None or not scope.writer.is_before(node):
            continue
        if same_shape(shape_of(node), shape):
            return node
    return scope.writer.zeros(shape)
