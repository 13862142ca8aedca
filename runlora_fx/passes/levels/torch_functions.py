"""The torch level: ``symbolic_trace`` and Dynamo graphs of torch functions and tensor methods.

Example: ``x.matmul(w.T)`` and ``F.linear(x, w)`` are one form, the product ``x w'``.

Invariant: ``detach`` is not read, because graphs of this level are still to be differentiated.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from runlora_fx.passes.levels import readers as builders
from runlora_fx.passes.levels.forms import Form
from runlora_fx.passes.levels.level import Calls, Dialect
from runlora_fx.passes.levels.modules import read_module


def _keywords(reader: Callable[..., Form | None], *names: str) -> Callable[..., Form | None]:
    """Let a reader be called with torch's own argument names."""

    def read(*args: Any, **kwargs: Any) -> Form | None:
        for name in names[len(args) :]:
            if name in kwargs:
                args = (*args, kwargs.pop(name))
        return reader(*args, **kwargs)

    return read


def _add(a: Any, b: Any, *, alpha: Any = 1) -> Form | None:
    return builders.add(a, b, alpha)


def _sub(a: Any, b: Any, *, alpha: Any = 1) -> Form | None:
    return builders.add(a, b, alpha, sign=-1.0)


def _einsum(equation: str, *operands: Any) -> Form | None:
    nested = len(operands) == 1 and isinstance(operands[0], list | tuple)
    factors = operands[0] if nested else operands
    return builders.einsum(equation, factors) or builders.summed_rows(equation, factors)


def _addmm(c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Form | None:
    return builders.addmm(c, a, b, beta, alpha)


def _permute(a: Any, *dims: Any) -> Form | None:
    nested = len(dims) == 1 and isinstance(dims[0], list | tuple)
    return builders.permute(a, dims[0] if nested else dims)


def _attribute(a: Any, name: str) -> Form | None:
    return builders.t(a) if name in ("T", "mT") and builders.ndim(a) == 2 else None


_matmul = _keywords(builders.matmul, "input", "other")
_product = _keywords(builders.product, "input", "mat2")
_dropout = _keywords(builders.dropout, "input", "p", "training", "inplace")
_linear = _keywords(builders.linear, "input", "weight", "bias")

TORCH = Dialect(
    name="torch",
    graph="torch",
    readers={
        F.linear: _linear,
        torch.matmul: _matmul,
        operator.matmul: builders.matmul,
        "matmul": builders.matmul,
        "__matmul__": builders.matmul,
        torch.mm: _product,
        "mm": builders.product,
        torch.bmm: _product,
        "bmm": builders.product,
        torch.addmm: _addmm,
        "addmm": _addmm,
        torch.baddbmm: _addmm,
        "baddbmm": _addmm,
        torch.einsum: _einsum,
        torch.functional.einsum: _einsum,
        operator.add: _add,
        torch.add: _add,
        "add": _add,
        operator.sub: _sub,
        torch.sub: _sub,
        "sub": _sub,
        operator.neg: builders.neg,
        torch.neg: builders.neg,
        "neg": builders.neg,
        operator.mul: builders.scale,
        torch.mul: builders.scale,
        "mul": builders.scale,
        operator.truediv: builders.divide,
        torch.div: builders.divide,
        "div": builders.divide,
        torch.permute: _permute,
        "permute": _permute,
        torch.transpose: builders.transpose,
        "transpose": builders.transpose,
        torch.swapaxes: builders.transpose,
        torch.t: builders.t,
        "t": builders.t,
        getattr: _attribute,
        torch.reshape: builders.same,
        "reshape": builders.same,
        "view": builders.same,
        torch.flatten: builders.same,
        "flatten": builders.same,
        "unflatten": builders.same,
        torch.unsqueeze: builders.same,
        "unsqueeze": builders.same,
        torch.squeeze: builders.same,
        "squeeze": builders.same,
        "contiguous": builders.copy,
        "clone": builders.copy,
        torch.clone: builders.copy,
        F.dropout: _dropout,
        torch.dropout: _dropout,
        "to": builders.cast,
        torch.Tensor.to: builders.cast,
        "type": builders.cast,
        "float": builders.cast,
        "half": builders.cast,
        "bfloat16": builders.cast,
        "double": builders.cast,
        torch.eye: builders.eye,
    },
    modules=read_module,
    calls=Calls(
        mm=torch.mm,
        bmm=torch.bmm,
        addmm=torch.addmm,
        add=torch.add,
        mul=torch.mul,
        div=torch.div,
        permute=torch.permute,
        view=torch.reshape,
        reshape=torch.reshape,
        size=torch.ops.aten.sym_size.int,
        full=torch.full,
        expand=torch.broadcast_to,
        sum=torch.sum,
        cast=torch.Tensor.to,
        clone=torch.clone,
        stacked=torch.matmul,
    ),
)
