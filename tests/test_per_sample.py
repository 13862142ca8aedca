"""Adapters for each sample: tables of adapters, and an index that gives each sample one of them.

``Y = X W' + s (X A[k]') B[k]'`` gathers ``A[k]`` and ``B[k]``. Where samples are many and adapters
few, a product with all adapters and the pick of each sample's columns move less.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import RUNLORA, RUNLORA_EAGER, assert_same_outputs_and_grads, compiled, scalar_kernels
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

import runlora_fx
from examples.flavours.per_sample import PerSampleLora, PerSampleLoraByEinsum
from runlora_fx.cost_model.objective import Objective
from runlora_fx.cost_model.published import PUBLISHED
from runlora_fx.passes.algebra.assignments import Assignment, Picked
from runlora_fx.passes.algebra.plan import incoming_cost
from runlora_fx.passes.algebra.polynomials import leaf
from runlora_fx.passes.algebra.problem import LeafSpec, Problem
from runlora_fx.passes.algebra.steps import Pick, Product, ProductWithAll
from runlora_fx.passes.search.decide import Decision, decide
from runlora_fx.report.sites import Site

ROOT = Path(__file__).parent.parent

WIDTH, OUT, RANK = 256, 192, 8
SAMPLES, ADAPTERS = 24, 3

H100 = Objective("time", profile=PUBLISHED["h100"].profile("bfloat16"))


@pytest.fixture(autouse=True)
def _no_memory_of_other_tests() -> None:
    """Dynamo makes a size symbolic that it has seen change."""
    torch._dynamo.reset()


def by_bmm(x: Tensor, a: Tensor, b: Tensor, k: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(x, a[k].mT), b[k].mT)


def by_matmul(x: Tensor, a: Tensor, b: Tensor, k: Tensor) -> Tensor:
    return x @ a[k].transpose(1, 2) @ b[k].transpose(1, 2)


def by_index_select(x: Tensor, a: Tensor, b: Tensor, k: Tensor) -> Tensor:
    return x @ a.index_select(0, k).mT @ torch.index_select(b, 0, k).mT


def by_einsum(x: Tensor, a: Tensor, b: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("btr,bor->bto", torch.einsum("bti,bri->btr", x, a[k]), b[k])


def by_rows_of_b(x: Tensor, a: Tensor, b: Tensor, k: Tensor) -> Tensor:
    """B is stored as the product reads it: (adapters, rank, outputs)."""
    return torch.bmm(torch.bmm(x, a[k].mT), b.mT.contiguous()[k])


def tables(
    tokens: int = 1,
    *,
    samples: int = SAMPLES,
    adapters: int = ADAPTERS,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Input, weight, tables of A and B, and the adapter of each sample."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    k = torch.randint(adapters, (samples,), generator=generator)
    x, weight = random(samples, tokens, WIDTH), random(OUT, WIDTH)
    return [x, weight, random(adapters, RANK, WIDTH), random(adapters, OUT, RANK), k]


Adapters = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def layer(adapters: Adapters) -> Callable[..., Tensor]:
    """A linear layer with what the adapters add."""

    def run(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, k: Tensor) -> Tensor:
        return x @ weight.mT + 2.0 * adapters(x, a, b, k)

    return run


def site() -> Site:
    """The only site of the last report."""
    report = runlora_fx.last_report()
    assert report is not None
    (found,) = report.sites
    return found


def rewritten(fn: Callable[..., Any], inputs: list[Tensor], **options: Any) -> fx.GraphModule:
    """A traced function, planned for an H100, with the values of eager mode."""
    chosen: dict[str, Any] = {"strict": True, "device": "h100", **options}
    found = runlora_fx.rewrite(make_fx(fn)(*inputs), inputs, **chosen)
    tolerance = 1e-12 if inputs[0].dtype == torch.float64 else 1e-5
    wanted = fn(*inputs)
    error = (found(*inputs) - wanted).abs().max() / wanted.abs().max()
    assert error < tolerance
    return found


def gathers(graph: fx.Graph) -> int:
    """How many tables are gathered from."""
    picks = (torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default)
    return sum(
        node.target in picks and node.args[0].op == "placeholder"  # type: ignore[union-attr]
        for node in graph.nodes
    )


# --- values


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("tokens", (1, 3))
@pytest.mark.parametrize("adapters", (by_bmm, by_matmul, by_index_select, by_einsum))
def test_few_adapters_are_multiplied_all(
    adapters: Adapters, tokens: int, dtype: torch.dtype
) -> None:
    inputs = tables(tokens, dtype=dtype)
    graph = rewritten(layer(adapters), inputs).graph
    assert gathers(graph) == 0
    assert site().after == "Y = 2 ((X A')[k] B')[k]"


@pytest.mark.parametrize(
    ("adapters", "plan"),
    ((by_bmm, "Y = 2 ((X A')[k] B')[k]"), (by_rows_of_b, "Y = 2 (X A')[k] B[k]")),
)
def test_a_table_that_lies_the_other_way_would_be_copied(adapters: Adapters, plan: str) -> None:
    """All matrices are one matrix only if the inner dimension lies last. The copy has a price."""
    rewritten(layer(adapters), tables(adapters=12))
    assert site().after == plan


@pytest.mark.parametrize(
    "index",
    (
        lambda k: k.to(torch.int32),
        lambda k: k - ADAPTERS,
        torch.zeros_like,
        lambda k: torch.stack([k, k], 1)[:, 0],
    ),
    ids=("int32", "negative", "equal", "strided"),
)
def test_indices_of_any_kind(index: Callable[[Tensor], Tensor]) -> None:
    *others, k = tables()
    graph = rewritten(layer(by_bmm), [*others, index(k)]).graph
    assert gathers(graph) == 0


def test_inputs_of_any_layout() -> None:
    x, *others = tables(3)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert gathers(rewritten(layer(by_bmm), [strided, *others]).graph) == 0


def test_numbers_that_are_not_finite_stay_with_their_adapter() -> None:
    """A table may have places that nothing was loaded into."""
    x, weight, a, b, k = tables()
    k = k.clamp(max=ADAPTERS - 2)
    a[-1], b[-1] = torch.inf, torch.nan
    inputs = [x, weight, a, b, k]
    fn = layer(by_bmm)
    found = runlora_fx.rewrite(make_fx(fn)(*inputs), inputs, strict=True, device="h100")
    assert site().changed
    result = found(*inputs)
    assert result.isfinite().all()
    torch.testing.assert_close(result, fn(*inputs))


@pytest.mark.parametrize("how", (PerSampleLora, PerSampleLoraByEinsum))
@pytest.mark.parametrize("tokens", (1, 3))
def test_a_compiled_model_has_the_values_of_eager(how: type[PerSampleLora], tokens: int) -> None:
    torch.manual_seed(0)
    model = how(torch.nn.Linear(WIDTH, OUT), ADAPTERS, RANK)
    x, *_, k = tables(tokens, dtype=torch.float32)
    with torch.no_grad():
        found = compiled(model, RUNLORA_EAGER, device="h100")(x, k)
        torch.testing.assert_close(found, model(x, k), rtol=1e-5, atol=1e-5)
    assert "(X A')[k]" in site().after


@scalar_kernels
def test_kernels_have_the_values_of_eager() -> None:
    torch.manual_seed(0)
    model = PerSampleLora(torch.nn.Linear(WIDTH, OUT), ADAPTERS, RANK)
    x, *_, k = tables(dtype=torch.float32)
    with torch.no_grad():
        found = compiled(model, RUNLORA, device="h100")(x, k - ADAPTERS)
        torch.testing.assert_close(found, model(x, k), rtol=1e-5, atol=1e-5)
    assert site().changed


def test_training_has_the_gradients_of_eager() -> None:
    torch.manual_seed(0)
    model = PerSampleLora(torch.nn.Linear(WIDTH, OUT), ADAPTERS, RANK).double()
    x, *_, k = tables()
    run = compiled(model, RUNLORA_EAGER, device="h100")
    assert_same_outputs_and_grads(model, run, [x.requires_grad_(), k], 1e-12)


def test_batches_that_vary() -> None:
    """Where the number of samples is a symbol, too."""
    model = PerSampleLora(torch.nn.Linear(WIDTH, OUT), ADAPTERS, RANK).double()
    options = {"runlora.strict": True, "runlora.device": "h100"}
    run = torch.compile(model, backend=RUNLORA_EAGER, fullgraph=True, dynamic=True, options=options)
    counters.clear()
    with torch.no_grad():
        for samples in (2, 24, 5, 300):
            x, *_, k = tables(samples=samples)
            torch.testing.assert_close(run(x, k), model(x, k))
    assert counters["stats"]["unique_graphs"] <= 2


# --- what is left alone


@pytest.mark.parametrize(
    ("sizes", "options"),
    (
        ({}, {"device": ""}),
        ({}, {"device": "xeon8480"}),
        ({}, {"objective": "flops"}),
        ({"adapters": 200}, {}),
        ({"tokens": 4096, "samples": 2}, {}),
    ),
    ids=("cpu", "published cpu", "flops", "many adapters", "prefill"),
)
def test_gathers_stay_where_they_cost_less(sizes: dict[str, int], options: dict[str, Any]) -> None:
    graph = rewritten(layer(by_bmm), tables(**sizes), **options).graph
    assert gathers(graph) == 2
    assert not site().changed


def test_a_gather_that_something_else_reads_stays() -> None:
    def fn(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, k: Tensor) -> Tensor:
        picked = a[k]
        low = torch.bmm(x, picked.mT)
        return x @ weight.mT + torch.bmm(low, b[k].mT) + picked.abs().sum()

    graph = rewritten(fn, tables()).graph
    assert gathers(graph) == 1


def test_two_layers_may_share_a_gather() -> None:
    """Then no plan of one of them spares it."""

    def fn(x: Tensor, a: Tensor, b: Tensor, c: Tensor, k: Tensor) -> Tensor:
        picked = a[k]
        one = torch.bmm(torch.bmm(x, picked.mT), b[k].mT)
        other = torch.bmm(torch.bmm(x.sin(), picked.mT), c[k].mT)
        return one.cos() * other

    x, _, a, b, k = tables()
    rewritten(fn, [x, a, b, b.flip(0), k])


def test_a_table_that_changes_after_the_gather_is_not_read_later() -> None:
    def fn(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, k: Tensor) -> Tensor:
        down, up, a = a[k], b[k], a.clone()
        b = b.clone()
        earlier = a[k]
        a.zero_()
        low = torch.bmm(x, earlier.mT) + torch.bmm(x, down.mT)
        return x @ weight.mT + torch.bmm(low, up.mT) + torch.bmm(low, b[k].mT) + a.sum()

    rewritten(fn, tables())


# --- prices

X, A, PICKED_A = range(3)


def problem(samples: int, adapters: int, *, tokens: int = 1) -> Problem:
    """``X A[k]'`` in bf16: 4096 inputs, rank 16."""
    leaves = (
        LeafSpec(2, 3, batch=0),
        LeafSpec(4, 3, batch=1),
        LeafSpec(4, 3, batch=0, picked=Picked(A, 0)),
    )
    empty = Problem(
        leaves,
        (samples, adapters, tokens, 4096, 16),
        (),
        (),
        frozenset(),
        2,
        "bfloat16",
        assignments=(Assignment("indexed", 0, 1),),
    )
    made = leaf(X) @ leaf(PICKED_A).T
    value = empty.value(made, False)
    picked = empty.value(leaf(PICKED_A), False)
    steps = (
        (picked, Pick(leaf(A), 0).making(leaf(PICKED_A))),
        (value, Product(leaf(X), leaf(PICKED_A).T).making(made)),
    )
    return replace(empty, demands=(value,), incoming=steps)


def planned(samples: int, adapters: int, tokens: int = 1) -> tuple[Problem, Decision]:
    posed = problem(samples, adapters, tokens=tokens)
    return posed, decide(posed, H100)


def test_the_gather_is_counted_and_so_is_the_product_with_all() -> None:
    posed, decision = planned(64, 8)
    matrix, row = 2 * 16 * 4096, 2 * 4096
    before, after = decision.before, decision.after
    assert before == incoming_cost(posed)
    assert before["picked"] == 2 * 64 * matrix
    assert before["read"] == 64 * (matrix + row)
    assert before.flops == 2 * 64 * 16 * 4096
    assert after["picked"] == 0
    assert after["read"] == 8 * matrix + 64 * row
    assert after["written"] == 2 * 64 * 8 * 16
    assert after["elementwise"] == 2 * 2 * 64 * 16
    assert after.flops == 8 * before.flops
    assert decision.plan is not None
    assert any(isinstance(step, ProductWithAll) for step in decision.plan.steps.values())


@pytest.mark.parametrize(
    ("samples", "adapters", "tokens", "changed"),
    (
        (8, 2, 1, True),
        (8, 32, 1, False),
        (64, 32, 1, True),
        (64, 1024, 1, False),
        (8, 8, 512, False),
    ),
)
def test_prices_decide(samples: int, adapters: int, tokens: int, changed: bool) -> None:
    """A gather moves three times what it picks, a product with all the whole table once."""
    assert planned(samples, adapters, tokens)[1].changed == changed


def test_the_published_counts_are_those_of_this_code() -> None:
    """`benchmarks/per_sample_costs.py` wrote the table of docs/flavours.md."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from per_sample_costs import row
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in [name for name in sys.modules if name.startswith("measuring")]:
            sys.modules.pop(name)
    text = (ROOT / "docs" / "flavours.md").read_text(encoding="utf-8")
    for samples, adapters in ((64, 8), (8, 32)):
        cells = row(samples, adapters, tokens=2, width=4096, rank=16, device="h100").cells
        assert f"| {' | '.join(cells)} |" in text
