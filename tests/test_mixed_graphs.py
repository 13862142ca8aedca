"""Graphs that mix ATen operators and torch functions: each node is read by its own level."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same_outputs_and_grads
from torch import Tensor, fx

import runlora_fx

aten: Any = torch.ops.aten


@torch.library.custom_op("runlora_tests::shifted", mutates_args=())
def shifted(x: Tensor) -> Tensor:
    """A user's own operator."""
    return x + 1


@shifted.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


shifted.register_autograd(lambda ctx, grad: grad)


def _given() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 20, 8), (10, 8), (2, 8), (10, 2)]
    made = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [x.requires_grad_() for x in made]


def _with_an_operator(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    x = torch.ops.runlora_tests.shifted.default(x)
    return (F.linear(x, w) + 2 * F.linear(F.linear(x, a), b)).tanh()


def _with_a_product(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The low-rank product is spelled in ATen, the base in torch functions."""
    flat = x.reshape(-1, 8)
    low = aten.mm.default(aten.mm.default(flat, aten.t.default(a)), aten.t.default(b))
    return (F.linear(flat, w) + low).tanh()


def _with_a_reduction(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = F.linear(x.reshape(-1, 8), w)
    return aten.sum.dim_IntList(aten.mul.Tensor(y, y), [1]).tanh() + torch.einsum("ij,ij->i", y, y)


def _targets(gm: fx.GraphModule) -> set[Any]:
    return {node.target for node in gm.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("fn", [_with_an_operator, _with_a_product])
def test_what_is_written_into_a_graph_of_torch_functions_are_torch_functions(fn: Any) -> None:
    rewritten: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> fx.GraphModule:
        rewritten.append(runlora_fx.rewrite(gm, strict=True))
        return rewritten[0]

    torch._dynamo.reset()
    given = _given()
    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    assert_same_outputs_and_grads(fn, compiled, given, 1e-10)
    report = runlora_fx.last_report()
    assert report is not None
    assert report.graph == "torch"
    assert report.flops_after < report.flops_before
    assert not _targets(rewritten[0]) & {aten.mm.default, aten.addmm.default, aten.add.Tensor}


def test_dots_of_rows_are_read_at_both_levels() -> None:
    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> fx.GraphModule:
        return runlora_fx.rewrite(gm, strict=True)

    torch._dynamo.reset()
    given = _given()
    compiled = torch.compile(_with_a_reduction, backend=backend, fullgraph=True)
    assert_same_outputs_and_grads(_with_a_reduction, compiled, given, 1e-10)
