"""Gradients of vectors that scale rows or columns: diagonals of products, planned with all else.

``d diag(g) (X A' B')`` reduces ``sum(dY * (X A' B'), 1)``, which is ``sum((dY B) * (X A'), 1)``: of
the two, tensors of rank r have to exist anyway. Likewise for the columns that VeRA scales.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import INDUCTOR, RUNLORA, assert_same_values, counting, ours, outputs_and_grads
from checks import saved_bytes as bytes_saved
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import runlora_fx
from runlora_fx.cost_model.devices.machine import Machine
from runlora_fx.options import Options
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.pipeline import rewrite_graph
from runlora_fx.passes.read.analysis import Analysis

IN, OUT, RANK, EXPERTS = 48, 64, 4, 2
MANY, FEW = 160, 16  # tokens: more, and fewer, than IN and OUT


class Gated(nn.Module):
    """``x W' + sum_i g_i (x A_i') B_i'`` with gates for every token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
        self.router = nn.Linear(IN, EXPERTS, bias=False)
        self.down = nn.ModuleList(nn.Linear(IN, RANK, bias=False) for _ in range(EXPERTS))
        self.up = nn.ModuleList(nn.Linear(RANK, OUT, bias=False) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        y: Tensor = self.base(x)
        for i, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            y = y + gates[..., i : i + 1] * up(down(x))
        return y


class GatedInput(Gated):
    """The same with the gates in front of A, as X-LoRA has them."""

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        y: Tensor = self.base(x)
        for i, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            y = y + up(down(gates[..., i : i + 1] * x))
        return y


class Scaled(nn.Module):
    """``x W' + ((x A') diag(d) B') diag(b)`` with only the vectors trained, as VeRA has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
        self.down = nn.Linear(IN, RANK, bias=False).requires_grad_(False)
        self.up = nn.Linear(RANK, OUT, bias=False).requires_grad_(False)
        self.d = nn.Parameter(torch.rand(RANK))
        self.b = nn.Parameter(torch.rand(OUT))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.b * self.up(self.d * self.down(x))
        return y


def activation(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, tokens // 2, IN, generator=generator, requires_grad=True)


def compiled(model: nn.Module, x: Tensor, backend: str) -> tuple[dict[str, Tensor], int, int]:
    """Values of a step, FLOPs of its products, and bytes held for its backward."""
    torch._dynamo.reset()
    options = None if backend == INDUCTOR else ours(objective="flops")
    run: Any = torch.compile(model, backend=backend, fullgraph=True, options=options)
    with counting() as flops:
        values = outputs_and_grads(run, [x])
    given = [*model.parameters(), x]
    return values, sum(flops), bytes_saved(lambda: run(x), given)


@pytest.mark.parametrize("kind", (Gated, GatedInput))
def test_gates_hold_what_has_the_rank(kind: type[Gated]) -> None:
    """Neither the experts' outputs nor gated inputs are held: only X A' is, and the gates."""
    model, x = kind(), activation(MANY)
    wanted, flops_before, saved_before = compiled(model, x, INDUCTOR)
    found, flops, saved = compiled(model, x, RUNLORA)
    assert_same_values(found, wanted, 1e-5)
    assert flops <= flops_before
    wide = OUT if kind is Gated else IN
    assert saved <= saved_before - 4 * MANY * EXPERTS * (wide - RANK)
    report = runlora_fx.last_report()
    assert report is not None
    assert all("as many FLOPs" in site.reason for site in report.sites)


def test_scaled_columns_merge() -> None:
    """Merging leaves ``x A' d`` and ``dY' (x A' d)``, from which both gradients follow."""
    model, x = Scaled(), activation(MANY)
    wanted, flops_before, saved_before = compiled(model, x, INDUCTOR)
    found, flops, saved = compiled(model, x, RUNLORA)
    assert_same_values(found, wanted, 1e-5)
    assert flops < flops_before
    assert saved <= saved_before - 4 * MANY * OUT
    report = runlora_fx.last_report()
    assert report is not None
    assert "rowsum(" in report.sites[0].after


def test_few_tokens_are_left_alone() -> None:
    """Where nothing is gained in products, the vectors' gradients are reduced as they came."""
    model, x = Scaled(), activation(FEW)
    wanted, flops_before, _ = compiled(model, x, INDUCTOR)
    found, flops, _ = compiled(model, x, RUNLORA)
    assert flops == flops_before
    assert_same_values(found, wanted, 1e-5)


def reducing(tokens: int, dims: list[int], *, keepdim: bool) -> fx.GraphModule:
    """A graph with ``sum(t * (x w), dims)``, as autograd leaves it."""

    def fn(t: Tensor, x: Tensor, w: Tensor) -> Tensor:
        product = torch.ops.aten.view.default(torch.ops.aten.mm.default(x, w), [2, -1, OUT])
        return torch.ops.aten.sum.dim_IntList(product * t, dims, keepdim)

    t, x, w = (torch.randn(s) for s in ((2, tokens // 2, OUT), (tokens, IN), (IN, OUT)))
    return make_fx(fn, tracing_mode="fake")(t, x, w)


@pytest.mark.parametrize("dims", ([2], [-1], [0, 1]))
@pytest.mark.parametrize("keepdim", (False, True))
def test_a_sum_of_products_is_read_as_it_is(dims: list[int], keepdim: bool) -> None:
    """The sum is the diagonal of ``T (X w)'``: no root but the sum, and nothing is written."""
    gm = reducing(MANY, dims, keepdim=keepdim)
    before = gm.code
    analysis = Analysis(gm.graph, ATEN)
    (root,) = analysis.reader.roots
    assert root.target is torch.ops.aten.sum.dim_IntList
    assert analysis.reader.expression(root).is_diag_part
    (multiplication,) = analysis.reader.linear.absorbed
    assert multiplication.target is torch.ops.aten.mul.Tensor
    gm.recompile()
    assert gm.code == before


def test_what_sums_over_other_dimensions_is_no_diagonal() -> None:
    gm = reducing(MANY, [1], keepdim=False)
    reader = Analysis(gm.graph, ATEN).reader
    assert not reader.linear.absorbed
    assert not any(reader.expression(root).is_diag_part for root in reader.roots)


def reading(fn: Callable[[Tensor, Tensor], object]) -> tuple[fx.GraphModule, Analysis]:
    gm = make_fx(fn, tracing_mode="fake")(torch.randn(MANY, OUT), torch.randn(OUT, OUT))
    return gm, Analysis(gm.graph, ATEN)


def test_a_multiplication_with_another_reader_is_not_a_part_of_the_sum() -> None:
    def fn(t: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        product = torch.ops.aten.mul.Tensor(torch.ops.aten.mm.default(t, w), t)
        return torch.ops.aten.sum.dim_IntList(product, [1]), torch.ops.aten.relu.default(product)

    _, analysis = reading(fn)
    assert [root.target for root in analysis.reader.roots] == [torch.ops.aten.mm.default]


def test_elementwise_arithmetic_without_a_product_is_not_read() -> None:
    """The backward of a norm sums up products of leaves: no region is made of it."""

    def fn(t: Tensor, w: Tensor) -> Tensor:
        return torch.ops.aten.sum.dim_IntList(torch.ops.aten.mul.Tensor(t, t + 1), [0])

    _, analysis = reading(fn)
    assert not analysis.reader.roots


def test_a_multiplication_stays_in_front_of_what_modifies_its_factor() -> None:
    def fn(t: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        product = torch.ops.aten.mul.Tensor(torch.ops.aten.mm.default(t, w), t)
        torch.ops.aten.add_.Tensor(t, 1.0)
        return torch.ops.aten.sum.dim_IntList(product, [1]), t

    _, analysis = reading(fn)
    assert not analysis.reader.linear.absorbed


def test_no_einsum_of_ours_is_left() -> None:
    """The compiler sees products and sums, and an einsum only where the user wrote it."""

    def fn(x: Tensor, a: Tensor, b: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        product = torch.ops.aten.mm.default(torch.ops.aten.mm.default(x, a), b)
        own = torch.ops.aten.einsum.default("no,no->n", [product, t])
        return torch.ops.aten.sum.dim_IntList(product * t, [1]), own

    shapes = ((MANY, IN), (IN, RANK), (RANK, OUT), (MANY, OUT))
    inputs = [torch.randn(s, dtype=torch.float64) for s in shapes]
    gm = make_fx(fn, tracing_mode="fake")(*inputs)
    wanted = fn(*inputs)
    rewrite_graph(
        gm.graph, ATEN, Options(objective="flops", strict=True), Machine(use_stored=False)
    )
    gm.recompile()
    for found, value in zip(gm(*inputs), wanted, strict=True):
        torch.testing.assert_close(found, value)
    einsums = [n for n in gm.graph.nodes if n.target is torch.ops.aten.einsum.default]
    assert len(einsums) <= 1


def test_strict_numerics_keeps_the_rounding_of_narrow_dtypes() -> None:
    """Under "strict" nothing below 32 bits is materialised that was not: bit for bit as it came."""
    model, x = Gated().bfloat16(), activation(MANY).detach().bfloat16().requires_grad_()
    values = []
    for numerics in ("strict", "default"):
        torch._dynamo.reset()
        options = ours(numerics=numerics, objective="flops")
        run: Any = torch.compile(model, backend="runlora_eager", options=options)
        values.append(outputs_and_grads(run, [x]))
        report = runlora_fx.last_report()
        assert report is not None
        assert any(site.changed for site in report.sites) == (numerics == "default")
    torch._dynamo.reset()
    plain: Any = torch.compile(model, backend="aot_eager")
    for name, wanted in outputs_and_grads(plain, [x]).items():
        assert torch.equal(values[0][name], wanted), name


def test_gradients_of_gates_agree_with_autograd() -> None:
    """In fp64 to the last digits, at batch shapes of rank two and three."""
    for shape in ((MANY, IN), (4, MANY // 4, IN)):
        model = Gated().double()
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        torch._dynamo.reset()
        run: Any = torch.compile(model, backend="runlora_eager", options=ours(objective="flops"))
        assert_same_values(outputs_and_grads(run, [x]), outputs_and_grads(model, [x]), 1e-13)
