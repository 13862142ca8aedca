"""The ATen level: joint and inference graphs after AOTAutograd, ``make_fx``, ``torch.export``.

Example: ``aten.linear(x, w, b)`` is the sum of ``x w'`` and the broadcast ``b``.

Invariant: at the differentiable level ``detach`` is not read, for it stops a gradient.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from runlora_fx.passes.levels import convolutions, experts
from runlora_fx.passes.levels import readers as builders
from runlora_fx.passes.levels.forms import Form, Identity, MatrixProduct, RepeatedProduct
from runlora_fx.passes.levels.level import Calls, Dialect
from runlora_fx.passes.levels.quantised import gemm_4bit
from runlora_fx.passes.levels.sizes import equal, example_of, requested_shape, same_shape, shape_of
from runlora_fx.runtime import kept_weights as reuse  # noqa: F401  (registers the operator)

_aten = torch.ops.aten


def _sub(a: Any, b: Any, alpha: Any = 1) -> Form | None:
    return builders.add(a, b, alpha, sign=-1.0)


def _mul(a: Any, b: Any) -> Form | None:
    return builders.scale(a, b) or experts.outer_product(a, b)


def _result(several: Any, i: Any) -> Form | None:
    """One of several results of a call."""
    return experts.result(several, i) or convolutions.result(several, i)


def _merged(base: Any, left: Any, right: Any, alpha: Any) -> Form | None:
    return builders.addmm(base, left, right, 1, alpha)


def _copy(into: Any, source: Any, *_: Any) -> Form | None:
    """What autograd makes of an update of a view in place."""
    here, there = example_of(into), example_of(source)
    if here is None or there is None or here.dtype != there.dtype:
        return None
    return builders.copy(source) if same_shape(shape_of(into), shape_of(source)) else None


def _einsum(equation: str, operands: Any, path: Any = None) -> Form | None:
    return builders.einsum(equation, operands) or builders.summed_rows(equation, operands)


def _sum(x: Any, dims: Any, keepdim: Any = False) -> Form | None:
    """A sum of elementwise products that nothing else reads; ``keepdim`` moves no element."""
    is_product = isinstance(x, fx.Node) and x.target is _aten.mul.Tensor and not x.kwargs
    if not is_product or len(x.users) > 1:
        return None
    a, b = x.args
    return builders.sum_of_products(x, a, b, dims)


def _is_iota(node: object) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target is _aten.unsqueeze.default:
        return _is_iota(node.args[0])
    if node.target is torch.ops.prims.iota.default:
        return (node.kwargs.get("start", 0), node.kwargs.get("step", 1)) == (0, 1)
    return node.target is _aten.arange.default and len(node.args) == 1


def _compare(node: fx.Node) -> bool:
    """True if a node is ``iota[:, None] == iota``: how decompositions spell eye."""
    if node.target is not _aten.eq.Tensor:
        return False
    row, column = node.args
    return (
        builders.ndim(node) == 2
        and equal(*shape_of(node))
        and _is_iota(row)
        and _is_iota(column)
        and {builders.ndim(row), builders.ndim(column)} == {1, 2}
    )


def _cast(a: Any, *_: Any, **__: Any) -> Form | None:
    return Identity() if isinstance(a, fx.Node) and _compare(a) else builders.cast(a)


def _where(condition: Any, one: Any, zero: Any) -> Form | None:
    def constant(x: Any) -> Any:
        full = isinstance(x, fx.Node) and x.target is _aten.full.default
        return x.args[1] if full else x

    is_eye = isinstance(condition, fx.Node) and _compare(condition)
    return Identity() if is_eye and constant(one) == 1 and constant(zero) == 0 else None


def _expand(a: Any, size: Any, **_: Any) -> Form | None:
    wanted = requested_shape(size)
    if wanted is None or len(wanted) != builders.ndim(a):
        return None
    kept = all(
        equal(want, -1) or equal(have, want) for have, want in zip(shape_of(a), wanted, strict=True)
    )
    return builders.same(a) if kept else None


def _bmm(a: Any, b: Any) -> Form | None:
    """A batched product; of one matrix that ``expand`` repeats over the batch, a plain one.

    Before -> after: ``bmm(x, view(expand(w, [b, i, o]), [b, i, o]))`` -> ``x w``.
    """
    repeats: list[fx.Node] = []
    node = b
    while isinstance(node, fx.Node) and len(node.users) == 1 and node.target in _REPEATING:
        repeats.append(node)
        source: Any = node.args[0]
        if builders.ndim(source) == 2 and same_shape(shape_of(node)[1:], shape_of(source)):
            form = builders.matmul(a, source)
            if isinstance(form, MatrixProduct):
                return RepeatedProduct(form.left, form.right, form.out, tuple(repeats))
        is_alike = builders.ndim(source) == 3 and same_shape(shape_of(node), shape_of(source))
        node = source if is_alike else None
    return builders.product(a, b)


#: What shows a matrix once for every matrix of a batch, or the same tensor in the same shape.
_REPEATING = (_aten.expand.default, _aten.view.default, _aten._unsafe_view.default)

ATEN = Dialect(
    name="aten",
    graph="inference",
    readers={
        _aten.mm.default: builders.product,
        _aten.bmm.default: _bmm,
        _aten.addmm.default: builders.addmm,
        _aten.baddbmm.default: builders.addmm,
        _aten.matmul.default: builders.matmul,
        _aten.linear.default: builders.linear,
        _aten.einsum.default: _einsum,
        _aten.sum.dim_IntList: _sum,
        _aten.add.Tensor: builders.add,
        _aten.sub.Tensor: _sub,
        _aten.neg.default: builders.neg,
        _aten.mul.Tensor: _mul,
        _aten.mul.Scalar: builders.scale,
        _aten.div.Tensor: builders.divide,
        _aten.div.Scalar: builders.divide,
        _aten.permute.default: builders.permute,
        _aten.transpose.int: builders.transpose,
        _aten.t.default: builders.t,
        _aten.view.default: builders.same,
        _aten._unsafe_view.default: builders.same,
        _aten.reshape.default: builders.same,
        _aten.flatten.using_ints: builders.same,
        _aten.unflatten.int: builders.same,
        _aten.unsqueeze.default: builders.same,
        _aten.squeeze.default: builders.same,
        _aten.squeeze.dim: builders.same,
        _aten.squeeze.dims: builders.same,
        _aten.expand.default: _expand,
        _aten.clone.default: builders.copy,
        _aten.copy.default: _copy,
        _aten.contiguous.default: builders.copy,
        _aten.dropout.default: builders.dropout,
        _aten.alias.default: builders.same,
        _aten.detach.default: builders.same,
        torch.ops.runlora.merged_weight.default: _merged,
        _aten._to_copy.default: _cast,
        _aten.to.dtype: _cast,
        torch.ops.prims.convert_element_type.default: _cast,
        _aten.eye.default: builders.eye,
        _aten.eye.m: builders.eye,
        _aten.where.self: _where,
        _aten.index.Tensor: experts.index,
        _aten.index_select.default: experts.index_select,
        _aten.index_put.default: experts.index_put,
        _aten._grouped_mm.default: experts.grouped_mm,
        _aten.convolution.default: convolutions.convolution,
        operator.getitem: _result,
    },
    foreign={
        "runlora.fused_merge.default": _merged,
        "bitsandbytes.gemm_4bit.default": gemm_4bit,
        "transformers.grouped_mm_fallback.default": experts.grouped_mm_fallback,
    },
    calls=Calls(
        mm=_aten.mm.default,
        bmm=_aten.bmm.default,
        addmm=_aten.addmm.default,
        add=_aten.add.Tensor,
        mul=_aten.mul.Tensor,
        div=_aten.div.Tensor,
        permute=_aten.permute.default,
        view=_aten.view.default,
        reshape=_aten.reshape.default,
        size=_aten.sym_size.int,
        full=_aten.full.default,
        expand=_aten.expand.default,
        sum=_aten.sum.dim_IntList,
        cast=torch.ops.prims.convert_element_type.default,
        clone=_aten.clone.default,
        merged_weight=torch.ops.runlora.merged_weight.default,
    ),
)

#: ATen graphs that autograd may still differentiate: there ``detach`` is not the identity.
DIFFERENTIABLE_ATEN = replace(
    ATEN,
    readers={op: read for op, read in ATEN.readers.items() if op is not _aten.detach.default},
    calls=replace(ATEN.calls, cast=_aten.to.dtype, merged_weight=None),
)
