"""Reading: what the polynomials of a graph are made of."""

from collections.abc import Callable

import pytest
import torch
from checks import matmul_flops
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import runlora_fx
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.read.analysis import Analysis
from runlora_fx.passes.read.reader import GraphReader

aten = torch.ops.aten


def read(fn: Callable[..., object], *args: Tensor) -> GraphReader:
    """The linear algebra of a function at the ATen level."""
    return Analysis(make_fx(fn)(*args).graph, ATEN).reader


def nodes(reader: GraphReader, target: object) -> list[fx.Node]:
    """The linear nodes that call an operator, in graph order."""
    return [node for node in reader.cuts if node.target is target]


@pytest.mark.parametrize("other", [[15, 3], [-1, 3]], ids=["equal", "spelled-otherwise"])
def test_views_of_one_product_are_one_leaf(other: list[int]) -> None:
    """Only the second view is read by something that is not linear."""

    def fn(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        y = aten.mm(x, w).view(3, 5, 3)
        first, second = aten.view(y, [15, 3]), aten.view(y, other)
        return aten.mm(first, v), aten.mm(second, v.t()), second.relu()

    reader = read(fn, torch.randn(15, 4), torch.randn(4, 3), torch.randn(3, 3))
    _, one, two = nodes(reader, aten.mm.default)
    assert reader.expression(one).leaves == reader.expression(two).leaves


def test_a_root_is_read_back_as_what_it_is_made_of() -> None:
    """One of two equal products is a root, a leaf for others, and one is expanded beside it."""

    def fn(x: Tensor, w: Tensor, u: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        first, second = aten.mm(x, w), aten.mm(x, w)
        return aten.mm(aten.mm(first, a), b) + aten.mm(second, u), second.relu()

    sizes = ((40, 4), (4, 8), (8, 6), (8, 64), (64, 6))
    args = [torch.randn(size, dtype=torch.float64) for size in sizes]
    graph = make_fx(fn)(*args)
    rewritten = runlora_fx.rewrite(graph, args, strict=True, objective="flops")
    assert matmul_flops(rewritten.graph) < matmul_flops(make_fx(fn)(*args).graph)
    for found, wanted in zip(rewritten(*args), fn(*args), strict=True):
        torch.testing.assert_close(found, wanted)


def test_an_identity_matrix_seen_as_a_row_is_a_leaf() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        one = aten.eye(3)
        return aten.mm(one, x), aten.mm(one.reshape(1, 9), aten.cat([x, x, x]))

    reader = read(fn, torch.randn(3, 4))
    whole, row = nodes(reader, aten.mm.default)
    assert [len(word.factors) for word in reader.expression(whole).words] == [1]
    assert [len(word.factors) for word in reader.expression(row).words] == [2]
