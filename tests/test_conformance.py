"""Every operator that a level reads, read and evaluated, against the operator's own result.

    F.linear(x, w, b) -> x w' + 1 b, in leaves x, w, b -> numbers -> equal to F.linear(x, w, b)

Each entry of a level's table needs samples here: a new reader fails the tests until it has one. A
sample is run with sizes 1 and 0, in several layouts and dtypes, with operands that products make
and with a product that reads the result, as readers look for products.
"""

import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers its operators)
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.words import Factor, Word
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.levels.cuts import IMAGES, Cut
from runlora_fx.passes.levels.geometry import KernelOf, Patches
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.levels.torch_functions import TORCH
from runlora_fx.passes.read.analysis import Analysis
from runlora_fx.passes.read.leaves import Leaves

aten, prims = torch.ops.aten, torch.ops.prims

#: Sizes of the dimensions that samples name, and the variants that are run besides.
SIZES = {"b": 2, "m": 5, "k": 4, "n": 3}
VARIANTS = ({}, {"m": 1}, {"k": 1}, {"n": 1}, {"b": 1}, {"m": 0}, {"k": 3, "m": 3})

#: Relative error that an operator may have against double precision.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}

#: Makes a random tensor of named sizes.
Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Call:
    """A call below the one that is read."""

    target: Any
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Sample:
    """Arguments to read an operator with.

    Attributes:
        make: The arguments, from a function that makes tensors.
        kwargs: The keyword arguments, or a function that makes them.
        is_read: Whether these arguments are linear algebra.
    """

    make: Callable[[Make], tuple[Any, ...]]
    kwargs: Callable[[Make], dict[str, Any]] = lambda t: {}
    is_read: bool = True


def s(make: Callable[[Make], tuple[Any, ...]], **kwargs: Any) -> Sample:
    return Sample(make, lambda t: kwargs)


def no(make: Callable[[Make], tuple[Any, ...]], **kwargs: Any) -> Sample:
    return Sample(make, lambda t: kwargs, is_read=False)


mkn = [s(lambda t: (t("m", "k"), t("k", "n")))]
batches = [s(lambda t: (t("b", "m", "k"), t("b", "k", "n")))]
matmuls = [
    *mkn,
    *batches,
    s(lambda t: (t("b", "m", "k"), t("k", "n"))),
    s(lambda t: (t(2, "b", "m", "k"), t(2, "b", "k", "n"))),
]
keyed_mm = Sample(lambda t: (t("m", "k"),), lambda t: {"mat2": t("k", "n")})
addmms = [
    s(lambda t: (t("m", "n"), t("m", "k"), t("k", "n"))),
    s(lambda t: (t("n"), t("m", "k"), t("k", "n")), beta=0.5, alpha=-2),
    s(lambda t: (t("m", "n"), t("m", "k"), t("k", "n")), beta=0),
]
baddbmms = [
    s(lambda t: (t("b", "m", "n"), t("b", "m", "k"), t("b", "k", "n"))),
    s(lambda t: (t("b", "m", "n"), t("b", "m", "k"), t("b", "k", "n")), beta=2, alpha=0.5),
]
linears = [
    s(lambda t: (t("m", "k"), t("n", "k"))),
    s(lambda t: (t("b", "m", "k"), t("n", "k"), t("n"))),
    s(lambda t: (t("k"), t("n", "k"))),
]
adds = [
    s(lambda t: (t("m", "n"), t("m", "n"))),
    s(lambda t: (t("m", "n"), t("n")), alpha=0.5),
    s(lambda t: (t("b", "m", "n"), t("n"))),
    s(lambda t: (t("b", "m", "n"), t("b", "m", "n"))),
    s(lambda t: (t("n"), 0.5)),
]
sums = [s(sample.make) for sample in adds]
scales = [
    s(lambda t: (t("m", "n"), 0.5)),
    s(lambda t: (t("m", "n"), t())),
    s(lambda t: (t("m", "n"), t(1))),
    s(lambda t: (t("m", "n"), t("n"))),
    s(lambda t: (t("b", "m", "n"), t("n"))),
    s(lambda t: (t("m", "n"), t("m", 1))),
    s(lambda t: (t("m", 1), t("m", "n"))),
    s(lambda t: (t("b", "m", "n"), t("b", "m", 1))),
]
divisions = [s(lambda t: (t("m", "n"), 0.5)), s(lambda t: (t("m", "n"), t()))]
negations = [s(lambda t: (t("m", "n"),)), s(lambda t: (t("b", "m", "n"),))]
whole = [s(lambda t: (t("m", "n"),)), s(lambda t: (t("b", "m", "n"),))]
permutes = [
    s(lambda t: (t("b", "m", "n", 1), [0, 1, 3, 2])),  # only a single element moves
    s(lambda t: (t("m", "n"), [1, 0])),
    s(lambda t: (t("b", "m", "n"), [0, 2, 1])),
    s(lambda t: (t("b", "m", "n"), [2, 0, 1])),
    s(lambda t: (t("b", "m", "n"), [1, 0, 2])),
    s(lambda t: (t("b", "m", "n"), [0, 1, -1])),
]
transposes = [s(lambda t: (t("m", "n"), 0, 1)), s(lambda t: (t("b", "m", "n"), 1, -1))]
ts = [s(lambda t: (t("m", "n"),)), s(lambda t: (t("n"),))]

#: Stride, padding, dilation, transposed, output padding and groups of convolutions.
convolutions = [
    s(lambda t: (t("b", "k", 5, 6), t("n", "k", 3, 2), None, *_moves([1, 1], [1, 0]))),
    s(lambda t: (t("b", "k", 6, 5), t("n", "k", 2, 2), t("n"), *_moves([2, 2], [0, 0], [2, 1]))),
    s(lambda t: (t("b", "k", "m"), t("n", "k", 1), t("n"), *_moves([1], [0]))),
    s(lambda t: (t("b", "k", 3, 3), t("k", "n", 1, 1), None, *_moves([1, 1], [0, 0], turned=True))),
    s(
        lambda t: (
            *(t("b", "k", 3, 4), t("k", "n", 3, 3), None),
            *_moves([2, 2], [1, 1], turned=True, left_over=[1, 0]),
        )
    ),
    no(lambda t: (t("b", 4, 5, 5), t(6, 2, 3, 3), None, *_moves([1, 1], [1, 1], groups=2))),
    no(
        lambda t: (
            t("b", "k", 3, 3),
            t("k", "n", 2, 2),
            t("n"),
            *_moves([1, 1], [0, 0], turned=True),
        )
    ),
]


def _moves(
    stride: list[int],
    padding: list[int],
    dilation: list[int] | None = None,
    *,
    turned: bool = False,
    left_over: list[int] | None = None,
    groups: int = 1,
) -> tuple[Any, ...]:
    """How a convolution moves over images."""
    ones, zeros = [1] * len(stride), [0] * len(stride)
    return stride, padding, dilation or ones, turned, left_over or zeros, groups


def _backward(t: Make, *moves: Any) -> Call:
    """The gradients of a convolution of images of 6 x 6 with a kernel of 3 x 3."""
    x, weight = torch.empty(2, 4, 6, 6), torch.empty(3, 4, 3, 3)
    y = aten.convolution.default(x, weight, None, *moves)
    sizes = (y.shape, x.shape, weight.shape)
    args = (*[t(*size) for size in sizes], [3], *moves, [True, True, True])
    return Call(aten.convolution_backward.default, args)


gradients = [
    s(lambda t: (_backward(t, *_moves([1, 1], [1, 1])), 0)),
    s(lambda t: (_backward(t, *_moves([1, 1], [1, 1])), 1)),
    s(lambda t: (_backward(t, *_moves([2, 3], [0, 1])), 0)),
    s(lambda t: (_backward(t, *_moves([2, 3], [0, 1])), 1)),
    no(lambda t: (_backward(t, *_moves([1, 1], [1, 1])), 2)),
]


def _stack(t: Make, *dims: str | int) -> Call:
    """A batch of matrices that a product makes, as readers of experts look for them."""
    *batch, rows, cols = dims
    return Call(aten.bmm.default, (t(*batch, rows, "k"), t(*batch, "k", cols)))


def _index(t: Make, experts: str) -> list[Tensor]:
    """Five tokens, the expert of each."""
    return [torch.arange(5) % t(experts).numel()]


def _ends(t: Make) -> Tensor:
    """Where the rows of three experts end: one has none."""
    return torch.tensor([t("m").numel() // 2, t("m").numel() // 2, t("m").numel()]).int()


def _pair(t: Make) -> Call:
    """Both gradients of a grouped product."""
    if not hasattr(torch.ops.transformers, "grouped_mm_fallback_backward"):
        pytest.skip("this transformers has no such operator")
    backward = torch.ops.transformers.grouped_mm_fallback_backward.default
    return Call(backward, (t("m", "k"), _stack(t, 3, "k", "n"), _ends(t), t("m", "n")))


picks = [s(lambda t: (_stack(t, "b", "m", "n"), _index(t, "b")))]
sums_by_expert = [
    s(
        lambda t: (
            Call(aten.new_zeros.default, (t("n"), [3, t("m").numel(), t("n").numel()])),
            [torch.tensor([0, 2, 2, 0, 2])],
            _stack(t, 5, "m", "n"),
            True,
        )
    )
]
# Its operands lie in whole 16 bytes.
grouped = [
    s(lambda t: (t("m", 8), t(3, 8, 16), _ends(t))),
    s(lambda t: (Call(aten.t.default, (t("m", 8),)), t("m", 16), _ends(t))),
]
results = [s(lambda t: (_pair(t), 0)), s(lambda t: (_pair(t), 1))]

views = [
    s(lambda t: (t("b", "m", "n"), [-1, t("n").numel()])),
    s(lambda t: (t("b", "m", "n"), [t("b").numel(), -1])),
    s(lambda t: (t("m", "n"), [1, t("m").numel(), t("n").numel()])),
]
unsqueezes = [s(lambda t: (t("m", "n"), 0)), s(lambda t: (t("m", "n"), -1))]
squeezes = [s(lambda t: (t(1, "m", "n"), 0)), s(lambda t: (t("m", 1, "n"), 1))]
flattens = [s(lambda t: (t("b", "m", "n"), 0, 1)), s(lambda t: (t("b", "m", "n"), 1, 2))]
unflattens = [s(lambda t: (t("m", 6), 1, (2, 3)))]
einsums = [
    ("bmk,nk->bmn", lambda t: (t("b", "m", "k"), t("n", "k"))),
    ("mk,kn->mn", lambda t: (t("m", "k"), t("k", "n"))),
    ("mk,kn->nm", lambda t: (t("m", "k"), t("k", "n"))),
    ("km,kn->mn", lambda t: (t("k", "m"), t("k", "n"))),
    ("bmk,bmn->kn", lambda t: (t("b", "m", "k"), t("b", "m", "n"))),
]
dots = [
    ("mn,mn->m", lambda t: (t("m", "n"), t("m", "n"))),
    ("mn,mn->n", lambda t: (t("m", "n"), t("m", "n"))),
    ("bmn,bmn->bm", lambda t: (t("b", "m", "n"), t("b", "m", "n"))),
]
unread = [
    ("bmk,bmk->b", lambda t: (t("b", "m", "k"), t("b", "m", "k"))),
    ("mm->m", lambda t: (t("m", "m"),)),
    ("m,n->mn", lambda t: (t("m"), t("n"))),
]
copies = whole
dropouts = [
    s(lambda t: (t("m", "n"), 0.5, False)),
    s(lambda t: (t("m", "n"), 0.0, True)),
    no(lambda t: (t("m", "n"), 0.5, True)),
    no(lambda t: (t("m", "n"),)),
]
casts = [s(lambda t: (t("m", "n"), torch.float32)), s(lambda t: (t("b", "m"), torch.float64))]
eyes = [s(lambda t: (t("m").numel() or 2,))]


def _einsum(equation: str, operands: Any, nested: bool, is_read: bool = True) -> Sample:
    def make(t: Make) -> tuple[Any, ...]:
        return (equation, list(operands(t))) if nested else (equation, *operands(t))

    return Sample(make, is_read=is_read)


def _iota(n: int) -> Call:
    return Call(prims.iota.default, (n,))


def _eye_condition(t: Make) -> Call:
    n = t("m").numel() or 2
    column = Call(aten.unsqueeze.default, (Call(aten.arange.default, (n,)), -1))
    return Call(aten.eq.Tensor, (column, Call(aten.arange.default, (n,))))


def _mul(a: Any, b: Any) -> Call:
    return Call(aten.mul.Tensor, (a, b))


def _made(t: Make, *rows: str) -> Call:
    return Call(aten.matmul.default, (t(*rows, "k"), t("k", "n")))


def _full(value: float) -> Call:
    return Call(aten.full.default, ([], value))


nested_einsums = [
    *(_einsum(*pair, True) for pair in (*einsums, *dots)),
    *(_einsum(*pair, True, False) for pair in unread),
]
flat_einsums = [
    *(_einsum(*pair, nested) for pair in (*einsums, *dots) for nested in (True, False)),
    *(_einsum(*pair, False, False) for pair in unread),
]

ATEN_SAMPLES: dict[Any, list[Sample]] = {
    aten.mm.default: mkn,
    aten.bmm.default: batches,
    aten.addmm.default: addmms,
    aten.baddbmm.default: baddbmms,
    aten.matmul.default: matmuls,
    aten.linear.default: linears,
    aten.einsum.default: nested_einsums,
    aten.sum.dim_IntList: [
        s(lambda t: (_mul(_made(t, "m"), t("m", "n")), [1])),
        s(lambda t: (_mul(t("m", "n"), _made(t, "m")), [0])),
        s(lambda t: (_mul(_made(t, "b", "m"), t("b", "m", "n")), [-1], True)),
        s(lambda t: (_mul(t("b", "m", "n"), _made(t, "b", "m")), [0, 1], True)),
        no(lambda t: (_mul(t("b", "m", "n"), t("b", "m", "n")), [1])),
        no(lambda t: (_mul(t("m", "n"), t("n")), [1])),
        no(lambda t: (t("m", "n"), [1])),
    ],
    aten.add.Tensor: adds,
    aten.sub.Tensor: adds,
    aten.neg.default: negations,
    aten.mul.Tensor: scales,
    aten.mul.Scalar: scales[:1],
    aten.div.Tensor: divisions,
    aten.div.Scalar: divisions[:1],
    aten.permute.default: permutes,
    aten.transpose.int: transposes,
    aten.t.default: ts,
    aten.view.default: views,
    aten._unsafe_view.default: views,
    aten.reshape.default: views,
    aten.flatten.using_ints: flattens,
    aten.unflatten.int: unflattens,
    aten.unsqueeze.default: unsqueezes,
    aten.squeeze.default: [s(lambda t: (t(1, "m", "n"),))],
    aten.squeeze.dim: squeezes,
    aten.squeeze.dims: [s(lambda t: (t(1, "m", 1, "n"), [0, 2]))],
    aten.expand.default: [
        s(lambda t: (t("m", "n"), [-1, t("n").numel()])),
        no(lambda t: (t(1, "n"), [3, -1])),
        no(lambda t: (t("n"), [2, -1])),
    ],
    aten.clone.default: copies,
    aten.copy.default: [
        s(lambda t: (t("m", "n"), t("m", "n"))),
        no(lambda t: (t("b", "m", "n"), t(1, "n"))),
    ],
    aten.contiguous.default: copies,
    aten.dropout.default: dropouts[:3],
    aten.alias.default: whole,
    aten.detach.default: whole,
    torch.ops.runlora.merged_weight.default: [
        s(lambda t: (t("m", "n"), t("m", "k"), t("k", "n"), 0.5)),
    ],
    aten._to_copy.default: [s(lambda t: (t("m", "n"),), dtype=torch.float32)],
    aten.to.dtype: casts,
    prims.convert_element_type.default: [
        *casts,
        s(lambda t: (_eye_condition(t), torch.float64)),
    ],
    aten.eye.default: [s(lambda t: (3,))],
    aten.eye.m: [s(lambda t: (3, 3)), no(lambda t: (3, 2))],
    aten.index.Tensor: picks,
    aten.index_select.default: [
        s(lambda t: (t("b", "m", "n"), 0, _index(t, "b")[0])),
        no(lambda t: (t("b", "m", "n"), 1, _index(t, "m")[0])),
    ],
    aten.index_put.default: sums_by_expert,
    aten._grouped_mm.default: grouped,
    operator.getitem: [*results, *gradients],
    aten.convolution.default: convolutions,
    aten.where.self: [
        s(lambda t: (_eye_condition(t), _full(1.0), _full(0.0))),
        no(lambda t: (_eye_condition(t), _full(2.0), _full(0.0))),
        no(lambda t: (t("m") > 0, t("m"), t("m"))),
    ],
}

TORCH_SAMPLES: dict[Any, list[Sample]] = {
    F.linear: [
        *linears,
        Sample(lambda t: (t("m", "k"),), lambda t: {"weight": t("n", "k"), "bias": t("n")}),
    ],
    torch.matmul: [
        *matmuls,
        Sample(lambda t: (t("m", "k"),), lambda t: {"other": t("k", "n")}),
    ],
    operator.matmul: matmuls,
    "matmul": matmuls,
    "__matmul__": matmuls,
    torch.mm: [*mkn, keyed_mm],
    "mm": mkn,
    torch.bmm: batches,
    "bmm": batches,
    torch.addmm: addmms,
    "addmm": addmms,
    torch.baddbmm: baddbmms,
    "baddbmm": baddbmms,
    torch.einsum: flat_einsums,
    torch.functional.einsum: flat_einsums,
    operator.add: sums,
    torch.add: adds,
    "add": adds,
    operator.sub: sums,
    torch.sub: adds,
    "sub": adds,
    operator.neg: negations,
    torch.neg: negations,
    "neg": negations,
    operator.mul: [*scales, s(lambda t: (2, t("m", "n"))), s(lambda t: (t("n"), t("m", "n")))],
    torch.mul: scales,
    "mul": scales,
    operator.truediv: [*divisions, no(lambda t: (2.0, t("m", "n")))],
    torch.div: [*divisions, no(lambda t: (t("m", "n"), 0.3), rounding_mode="floor")],
    "div": divisions,
    torch.permute: permutes,
    "permute": [*permutes, s(lambda t: (t("b", "m", "n"), 0, 2, 1))],
    torch.transpose: transposes,
    "transpose": transposes,
    torch.swapaxes: transposes,
    torch.t: ts,
    "t": ts,
    getattr: [
        s(lambda t: (t("m", "n"), "T")),
        s(lambda t: (t("m", "n"), "mT")),
        no(lambda t: (t("m", "n"), "data")),
        no(lambda t: (t("b", "m", "n"), "mT")),
    ],
    torch.reshape: views,
    "reshape": [*views, s(lambda t: (t("b", "m", "n"), -1, t("n").numel()))],
    "view": [*views, s(lambda t: (t("b", "m", "n"), -1, t("n").numel()))],
    torch.flatten: flattens,
    "flatten": [*flattens, s(lambda t: (t("b", "m", "n"),))],
    "unflatten": unflattens,
    torch.unsqueeze: unsqueezes,
    "unsqueeze": unsqueezes,
    torch.squeeze: squeezes,
    "squeeze": squeezes,
    "contiguous": copies,
    "clone": copies,
    torch.clone: copies,
    F.dropout: [
        *dropouts,
        s(lambda t: (t("m", "n"),), p=0.5, training=False),
        no(lambda t: (t("m", "n"),), p=0.5, training=False, inplace=True),
    ],
    torch.dropout: dropouts[:3],
    "to": [*casts, s(lambda t: (t("m", "n"),), dtype=torch.float32)],
    torch.Tensor.to: casts,
    "type": casts,
    "float": whole,
    "half": whole,
    "bfloat16": whole,
    "double": whole,
    torch.eye: [*eyes, no(lambda t: (3, 2))],
}

LEVELS: dict[str, tuple[Dialect, dict[Any, list[Sample]]]] = {
    "aten": (ATEN, ATEN_SAMPLES),
    "torch": (TORCH, TORCH_SAMPLES),
}
ENTRIES = [(level, target) for level, (_, samples) in LEVELS.items() for target in samples]


# --- making graphs


def _maker(sizes: dict[str, int], layout: str, dtype: torch.dtype) -> Make:
    generator = torch.Generator().manual_seed(0)

    def make(*dims: str | int) -> Tensor:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in dims]
        if layout == "turned" and shape:
            x = torch.randn(shape[::-1], generator=generator, dtype=torch.float64)
            return x.to(dtype).permute(*reversed(range(len(shape))))
        if layout == "sliced" and shape:
            wide = [*shape[:-1], 2 * shape[-1]]
            return torch.randn(wide, generator=generator, dtype=torch.float64).to(dtype)[..., ::2]
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return make


def _node_of(graph: fx.Graph, target: Any, args: Any, kwargs: Any) -> fx.Node:
    """A call with its result as example value; tensors become inputs, calls nodes below it."""

    def node_of(x: Any) -> Any:
        if isinstance(x, Call):
            return _node_of(graph, x.target, x.args, {})
        if not isinstance(x, Tensor):
            return x
        node = graph.placeholder(f"x{len(graph.nodes)}")
        node.meta["val"] = x
        return node

    def is_leaf(x: object) -> bool:
        return isinstance(x, Call)

    args = tree_map(node_of, tuple(args), is_leaf=is_leaf)
    kwargs = tree_map(node_of, dict(kwargs), is_leaf=is_leaf)
    if isinstance(target, str):
        node = graph.call_method(target, args, kwargs)
    else:
        node = graph.call_function(target, args, kwargs)
    values = fx.node.map_arg((args, kwargs), lambda below: below.meta["val"])
    call = getattr(values[0][0], target) if isinstance(target, str) else target
    node.meta["val"] = call(*values[0][isinstance(target, str) :], **values[1])
    return node


# --- reading and evaluating


def _read_in_a_graph(
    level: str, target: Any, args: Any, kwargs: Any, products: frozenset[int], consumed: bool
) -> tuple[fx.Graph, fx.Node]:
    """A graph with the call in it, and the call.

    Args:
        level: Which operators the graph is made of.
        target: What is called.
        args: Its arguments.
        kwargs: Its keyword arguments.
        products: Which of its tensors, by their number, a product makes.
        consumed: Whether a product, or a product scaled by it, reads the result.
    """
    matmul, mul = (aten.matmul.default, aten.mul.Tensor)
    if level == "torch":
        matmul, mul = torch.matmul, torch.mul
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    count = -1

    def made(x: Any) -> Any:
        nonlocal count
        if not isinstance(x, Tensor):
            return x
        count += 1
        if count not in products or x.dim() < 2:
            return x
        return Call(matmul, (x, random(x.shape[-1], x.shape[-1]).to(x.dtype)))

    graph = fx.Graph()
    is_leaf = lambda x: isinstance(x, Call)  # noqa: E731
    args, kwargs = tree_map(made, (tuple(args), dict(kwargs)), is_leaf=is_leaf)
    node = last = _node_of(graph, target, args, kwargs)
    if consumed:
        val = node.meta["val"]
        if val.dim() == 1:
            scaled = Call(matmul, (random(5, 4).to(val.dtype), random(4, len(val)).to(val.dtype)))
            last = _node_of(graph, mul, (scaled, node), {})
        else:
            weight = random(val.shape[-1], 2).to(val.dtype)
            last = _node_of(graph, matmul, (node, weight), {})
    graph.output(last)
    return graph, node


def _factor(leaves: Leaves, factor: Factor) -> Tensor:
    leaf = leaves.matrices[factor.leaf]
    batch, rows, cols = (int(size) for size in (leaf.batch, leaf.rows, leaf.cols))
    if leaf.picked is not None:
        base, k = leaf.picked
        matrix = _factor(leaves, Factor(base))[_experts(leaves, k)]
    elif isinstance(leaf.origin, Patches):
        matrix = _patches(leaf.origin)
    elif leaf.images:
        matrix = _matrix(leaf.node.meta["val"].double(), IMAGES)
    elif leaf.node is None:
        matrix = torch.ones(1, rows, cols, dtype=torch.float64)
    elif leaf.diagonal:
        matrix = torch.diag(leaf.node.meta["val"].double().reshape(-1))[None]
    else:
        matrix = leaf.node.meta["val"].double().reshape(batch, rows, cols)
    return matrix.mT if factor.transposed else matrix


def _matrix(val: Tensor, cut: Cut) -> Tensor:
    """A tensor as a cut shows it; the same tensor if it is the fold of a matrix."""
    if cut.images is None:
        return val.reshape([int(n) for n in cut.extents(tuple(val.shape))])
    return val if cut.images.folded else val.movedim(1, -1).reshape(1, -1, val.shape[1])


def _patches(origin: Patches) -> Tensor:
    """The patches of images, each a row."""
    kernel, stride, padding, dilation, _ = origin.geometry
    images = origin.image.meta["val"].double()
    if images.dim() != 4:
        raise NotImplementedError("patches of other images than planes")
    found = F.unfold(images, kernel, dilation, padding, stride)
    return found.transpose(1, 2).reshape(1, -1, found.shape[1])


def _folded(p: Polynomial, leaves: Leaves, like: Tensor) -> Tensor:
    """The fold of the matrix that a polynomial is."""
    (word,) = p.words
    kernels = leaves.matrices[word.factors[-1].leaf].origin
    assert isinstance(kernels, KernelOf)
    kernel, stride, padding, dilation, _ = kernels.geometry
    rows = _word(leaves, word, 0) * p.terms[0][1]
    columns = rows.reshape(like.shape[0], -1, rows.shape[2]).transpose(1, 2)
    return F.fold(columns, like.shape[2:], kernel, dilation, padding, stride)


def _experts(leaves: Leaves, k: int) -> Tensor:
    """The expert of each token."""
    assignment = leaves.assignments[k]
    given = assignment.node.meta["val"]
    if assignment.kind == "indexed":
        return given.long()
    return torch.searchsorted(given, torch.arange(int(assignment.tokens)).int(), right=True)


def _word(leaves: Leaves, word: Word, size: int) -> Tensor:
    result = torch.eye(size, dtype=torch.float64)[None]
    for i, factor in enumerate(word.factors):
        matrix = _factor(leaves, factor)
        result = matrix if i == 0 else result @ matrix
    for index in word.scalars:
        scalar = leaves.scalars[index]
        value = scalar.node.meta["val"]
        number = float(value.reshape(()) if isinstance(value, Tensor) else value)
        result = result / number if scalar.inverse else result * number
    for k in word.scattered:
        zeros = result.new_zeros(int(leaves.assignments[k].experts), *result.shape[1:])
        result = zeros.index_add(0, _experts(leaves, k), result)
    return torch.diagonal(result, dim1=1, dim2=2) if word.diag_part else result


def evaluated(p: Polynomial, leaves: Leaves, like: Tensor) -> Tensor:
    """The numbers of a polynomial: a batch of matrices, or a diagonal part."""
    result = torch.zeros_like(like, dtype=torch.float64)
    for word, c in p.terms:
        value = c * _word(leaves, word, like.shape[1])
        result = result + (value.reshape(like.shape) if word.diag_part else value)
    return result


def check(graph: fx.Graph, dialect: Dialect, node: fx.Node) -> bool:
    """Compare every root of a graph with its polynomial; whether a node was read through."""
    reader = Analysis(graph, dialect).reader
    values = [n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    tolerance = max(TOLERANCES.get(x.dtype, 0.0) for x in values)
    through = False
    for root in reader.roots:
        p, val = reader.expression(root), root.meta["val"]
        cut = reader.cuts[root]
        like = _matrix(val.double(), cut)
        is_fold = cut.images is not None and cut.images.folded is not None
        found = (_folded if is_fold else evaluated)(p, reader.leaves, like)
        error = float((found - like).norm() / like.norm().clamp(min=1.0)) if like.numel() else 0.0
        assert error <= tolerance, f"{root.name}: relative error {error:.3g}, read as {p}"
        leaves = {reader.leaves.matrices[i].node for i in p.leaves}
        leaves |= {reader.leaves.scalars[i].node for i in p.scalar_leaves}
        through |= node is root or node not in leaves
    return through


def _ways_to_read(arguments: Any) -> Iterator[tuple[frozenset[int], bool]]:
    """Which tensors of a call to make by products, and whether to read the result by one."""
    count = sum(isinstance(x, Tensor) for x in tree_leaves(arguments))
    choices = {frozenset[int](), frozenset(range(count)), *(frozenset([i]) for i in range(count))}
    for products in sorted(choices, key=sorted):
        yield products, True
        if products:
            yield products, False


# --- tests


@pytest.mark.parametrize("level", LEVELS)
def test_every_reader_has_samples(level: str) -> None:
    dialect, samples = LEVELS[level]
    missing = [target for target in dialect.readers if target not in samples]
    assert not missing, f"add samples for {missing}"
    assert not [target for target in samples if target not in dialect.readers]


def _id(x: object) -> str:
    """What an entry is called in every process: without the address of a function."""
    return re.sub(r" (of type object )?at 0x[0-9a-f]+", "", str(x))


@pytest.mark.parametrize(("level", "target"), ENTRIES, ids=_id)
def test_what_is_read_is_what_the_operator_computes(level: str, target: Any) -> None:
    dialect, samples = LEVELS[level]
    for number, sample in enumerate(samples[target]):
        seen = 0
        for changed, layout, dtype in product(VARIANTS, ("plain", "turned", "sliced"), TOLERANCES):
            if (bool(changed), layout != "plain", dtype != torch.float64).count(True) > 1:
                continue
            make = _maker(SIZES | changed, layout, dtype)
            try:
                arguments = sample.make(make), sample.kwargs(make)
                ways = list(_ways_to_read(arguments))
                graphs = [_read_in_a_graph(level, target, *arguments, *way) for way in ways]
            except RuntimeError:
                continue  # e.g. no view of these strides
            for way, (graph, node) in zip(ways, graphs, strict=True):
                where = f"sample {number}, {changed}, {layout}, {dtype}, {way}"
                if not sample.is_read:
                    assert dialect.read(node) is None, where
                    seen += 1
                    continue
                try:
                    seen += check(graph, dialect, node)
                except AssertionError as error:
                    raise AssertionError(f"{where}: {error}\n{graph}") from error
        assert seen, f"sample {number} is never read"
