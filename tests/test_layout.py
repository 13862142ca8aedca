"""Strides: a root keeps those that it came with, unless nobody who reads it relies on them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import RUNLORA_EAGER, ours
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import runlora_fx
from runlora_fx.passes.emit.nodes.layout import (
    _FOLLOWING,
    _IGNORING,
    is_relied_on,
    memory_order,
)
from runlora_fx.passes.levels.sizes import same_strides

aten = torch.ops.aten

BATCH, TOKENS, WIDTH, HEADS, RANK = 2, 5, 32, 4, 2


class DoraAttention(nn.Module):
    """Attention with DoRA on the query: with few tokens the plan takes ``W X'`` for ``X W'``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ParameterList(torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(3))
        self.a = nn.Parameter(torch.randn(RANK, WIDTH))
        self.b = nn.Parameter(torch.randn(WIDTH, RANK))
        self.magnitude = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def query(self, x: Tensor) -> Tensor:
        weight = self.qkv[0]
        norm = (weight + 2.0 * self.b @ self.a).norm(dim=1).detach()
        scale = self.magnitude / norm
        return scale * (x @ weight.t()) + scale * 2.0 * (x @ self.a.t() @ self.b.t())

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

        q, k, v = self.query(x), x @ self.qkv[1].t(), x @ self.qkv[2].t()
        return F.scaled_dot_product_attention(heads(q), heads(k), heads(v))


@pytest.mark.parametrize("training", (True, False), ids=("training", "inference"))
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_attention_reads_an_adapted_query(training: bool, dynamic: bool) -> None:
    torch.manual_seed(0)
    model, x = DoraAttention(), torch.randn(BATCH, TOKENS, WIDTH)
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend=RUNLORA_EAGER, dynamic=dynamic, fullgraph=True, options=ours()
    )
    results = []
    for run in (model, compiled):
        leaf = x.clone().requires_grad_(training)
        with torch.set_grad_enabled(training):
            y = run(leaf)
            if training:
                y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    report = runlora_fx.last_report()
    assert report is not None
    assert any(site.changed for site in report.sites)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def _few_tokens(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Two adapted layers of which the first is computed transposed, for its readers to see."""
    return x @ w.t() + x @ a.t() @ b.t()


def _given(tokens: int = TOKENS) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = ((tokens, WIDTH), (WIDTH, WIDTH), (RANK, WIDTH), (WIDTH, RANK))
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda y: aten.view.default(y, [-1]),
    "view of a sum": lambda y: aten.view.default(y + 1, [-1]),
    "as_strided": lambda y: torch.as_strided(y, (WIDTH,), (1,)) + 0,
    "output": lambda y: y,
    "softmax": lambda y: y.softmax(-1),
    "sum": lambda y: y.sin().sum(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("turned", (False, True), ids=("row-major", "column-major"))
def test_readers_get_the_strides_they_rely_on(reader: str, turned: bool) -> None:
    """A scaled product and a transposed one, of which the emitted root has other strides."""

    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = _few_tokens(x, w, a, b)
        y = (w @ x.t() + b @ (a @ x.t())).t() if turned else y
        return READERS[reader](y * w[0]) if not turned else READERS[reader](y.contiguous())

    inputs = _given()
    gm = make_fx(fn)(*inputs)
    rewritten = runlora_fx.rewrite(gm, inputs, strict=True)
    found, wanted = rewritten(*inputs), fn(*inputs)
    torch.testing.assert_close(found, wanted)
    assert found.stride() == wanted.stride()


@pytest.mark.parametrize("reader", READERS)
def test_a_value_that_is_read_in_both_orientations(reader: str) -> None:
    """The second root is the transpose of the first, which is computed once."""

    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        columns = w @ x.t() + b @ (a @ x.t())
        return columns.sin(), READERS[reader](_few_tokens(x, w, a, b))

    inputs = _given(tokens=96)
    gm = make_fx(fn)(*inputs)
    rewritten = runlora_fx.rewrite(gm, inputs, strict=True, objective="flops")
    found, wanted = rewritten(*inputs), fn(*inputs)
    torch.testing.assert_close(found, wanted)
    assert [x.stride() for x in found] == [x.stride() for x in wanted]
    copies = [n for n in rewritten.graph.nodes if n.target is aten.clone.default]
    assert len(copies) == (reader != "sum")


# --- who relies on strides


def _graph(fn: Callable[..., Any], *inputs: Tensor) -> fx.Node:
    """The first input of a graph of ATen operators."""
    gm = make_fx(fn, tracing_mode="fake")(*inputs)
    return next(iter(gm.graph.nodes))


MATRIX = (6, 4)

RELIES: dict[str, Callable[[Tensor], Any]] = {
    "output": lambda x: x,
    "view": lambda x: aten.view.default(x, [-1]).sum(),
    "view of a cast": lambda x: aten.view.default(x.double(), [-1]).sum(),
    "as_strided": lambda x: x.as_strided((2,), (1,)).sum(),
    "random": lambda x: torch.rand_like(x).sum(),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]).sum(),
    "in place": lambda x: x.mul_(2).sum(),
    "convolution": lambda x: F.conv1d(x[None], x[None, :, :1]).sum(),
}
TAKES_ANY: dict[str, Callable[[Tensor], Any]] = {
    "product": lambda x: x @ x.t(),
    "pointwise and sum": lambda x: x.sin().mul(2).sum(),
    "permute, then product": lambda x: x.permute(1, 0) @ x,
    "norm": lambda x: F.layer_norm(x, (4,)).sum(),
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("case", RELIES)
def test_relies(case: str) -> None:
    assert is_relied_on(_graph(RELIES[case], torch.rand(MATRIX)))


@pytest.mark.parametrize("case", TAKES_ANY)
def test_takes_any(case: str) -> None:
    assert not is_relied_on(_graph(TAKES_ANY[case], torch.rand(MATRIX)))


def _square() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 4, dtype=torch.float64)


# Arguments by which each listed operator takes a matrix of 4 rows and columns.
CALLS: dict[Any, Callable[[Tensor], tuple[Any, ...]]] = {
    aten.mm.default: lambda x: (x, x.clone()),
    aten.bmm.default: lambda x: (x[None], x[None]),
    aten.addmm.default: lambda x: (x, x, x),
    aten.baddbmm.default: lambda x: (x[None], x[None], x[None]),
    aten.mv.default: lambda x: (x, x[0]),
    aten.dot.default: lambda x: (x[0], x[:, 1]),
    torch.ops.runlora.merged_weight.default: lambda x: (x, x, x, 2.0),
    aten.permute.default: lambda x: (x, [1, 0]),
    aten.transpose.int: lambda x: (x, 0, 1),
    aten.reshape.default: lambda x: (x, [2, 8]),
    aten.unsqueeze.default: lambda x: (x, 0),
    aten.squeeze.dim: lambda x: (x, 0),
    aten.squeeze.dims: lambda x: (x, [0]),
    aten.expand.default: lambda x: (x, [2, 4, 4]),
    aten.slice.Tensor: lambda x: (x, 0, 1, 3),
    aten.select.int: lambda x: (x, 0, 1),
    aten.split.Tensor: lambda x: (x, 2),
    aten.split_with_sizes.default: lambda x: (x, [1, 3]),
    aten.unbind.int: lambda x: (x, 1),
    aten.cat.default: lambda x: ([x, x], 1),
    aten.stack.default: lambda x: ([x, x], 1),
    aten.to.dtype: lambda x: (x, torch.float32),
    torch.ops.prims.convert_element_type.default: lambda x: (x, torch.float32),
    aten.sum.dim_IntList: lambda x: (x, [0]),
    aten.mean.dim: lambda x: (x, [1]),
    aten.linalg_vector_norm.default: lambda x: (x, 2.0, [1]),
    aten.native_layer_norm.default: lambda x: (x, [4], x[0].clone(), None, 1e-5),
    aten._softmax.default: lambda x: (x, 1, False),
    aten._log_softmax.default: lambda x: (x, 0, False),
    aten.matmul.default: lambda x: (x, x),
    aten.linear.default: lambda x: (x, x),
    aten.einsum.default: lambda x: ("ab,cb->ac", [x, x]),
}


@pytest.mark.parametrize("operator", sorted(_IGNORING | _FOLLOWING, key=str), ids=str)
def test_listed_operators_compute_the_same_from_other_strides(operator: Any) -> None:
    call = CALLS.get(operator, lambda x: (x,))
    x = _square()
    turned = x.t().contiguous().t()
    assert turned.stride() == (1, 4)
    found, wanted = operator(*call(turned)), operator(*call(x))
    torch.testing.assert_close(found, wanted)
    if operator in _IGNORING:
        assert found.stride() == wanted.stride()


# --- layouts


def test_strides_of_single_rows_are_not_compared() -> None:
    row, other = torch.empty(1, 4), torch.empty_strided((1, 4), (9, 1))
    nodes = _placeholders(row, other, torch.empty_strided((2, 4), (1, 2)), torch.empty(2, 4))
    assert same_strides(nodes[0], nodes[1])
    assert not same_strides(nodes[2], nodes[3])


@pytest.mark.parametrize("order", ([0, 1, 2], [2, 0, 1], [1, 2, 0]))
def test_memory_order(order: list[int]) -> None:
    dense = torch.empty(2, 3, 4).permute(order).contiguous()
    back = [order.index(d) for d in range(3)]
    (node,) = _placeholders(dense.permute(back))
    assert memory_order(node, lambda size: int(size)) == order


@pytest.mark.parametrize("order", ([0, 1, 2], [2, 0, 1], [1, 2, 0], [2, 1, 0]))
@pytest.mark.parametrize("empty", (0, 1, 2))
def test_memory_order_of_a_tensor_without_elements(order: list[int], empty: int) -> None:
    shape = [0 if d == empty else 2 + d for d in range(3)]
    back = [order.index(d) for d in range(3)]
    turned = torch.empty([shape[d] for d in order]).permute(back)
    (node,) = _placeholders(turned)
    found = memory_order(node, lambda size: int(size))
    assert found is not None
    again = turned.permute(found).clone(memory_format=torch.contiguous_format)
    assert again.permute([found.index(d) for d in range(3)]).stride() == turned.stride()


def test_an_expanded_tensor_has_no_memory_order() -> None:
    (node,) = _placeholders(torch.empty(1, 4).expand(3, 4))
    assert memory_order(node, lambda size: int(size)) is None


def _placeholders(*values: Tensor) -> list[fx.Node]:
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(values))]
    for node, value in zip(nodes, values, strict=True):
        node.meta["val"] = value
    return nodes


# --- what it costs


@pytest.mark.parametrize("tokens", (TOKENS, 96))
def test_no_copy_where_nobody_relies_on_strides(tokens: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(DoraQuery(), nn.GELU(), DoraQuery())
    torch._dynamo.reset()
    graph = runlora_fx.joint_graph(model, [torch.randn(tokens, WIDTH)]).graph
    assert not [node for node in graph.nodes if node.target is aten.clone.default]


class DoraQuery(DoraAttention):
    """The adapted layer alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x)
