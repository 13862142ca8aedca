"""Stacks: products that read the same tensor run as one, without copies of what is computed."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import assert_same_values, ours, outputs_and_grads, saved_bytes
from market import randomise_lora_b
from peft import LoraConfig, get_peft_model
from torch import Tensor, fx, nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

import runlora_fx
from runlora_fx import Options
from runlora_fx.aot import aot_backend
from runlora_fx.passes.stack.blocks import blocks_of
from runlora_fx.passes.stack.find import Finder, Shared
from runlora_fx.passes.stack.matrices import matrix_of

aten = torch.ops.aten
RTOL = 1e-5
TOKENS, WIDTH, RANK = 2048, 256, 8
SIZES = (256, 128, 128)


class Attention(nn.Module):
    """Three projections of one input, of different widths, as keys and values have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, size, bias=False) for size in SIZES)
        self.o = nn.Linear(SIZES[0], WIDTH, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        n = self.norm(h)
        q, k, v = self.q(n), self.k(n), self.v(n)
        # The backward reads v, and something else than q and k.
        mixed: Tensor = torch.sigmoid(q) * torch.cat([torch.tanh(k).detach() * v, torch.sin(k)], -1)
        return h + self.o(mixed)


def adapted(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, lora_dropout=dropout, target_modules=["q", "k", "v", "o"]
    )
    model = get_peft_model(Attention().requires_grad_(False), config)  # type: ignore[arg-type]
    randomise_lora_b(model)
    return model.to(dtype)


def activation(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    return x.to(dtype).requires_grad_()


def joint(
    model: nn.Module, joins: bool = True, **options: Any
) -> tuple[fx.Graph, Callable[..., Any]]:
    """The joint graph as it is compiled, and the model, which runs operator by operator."""
    torch._dynamo.reset()
    seen: list[fx.Graph] = []
    chosen = Options(**{"strict": True, "device": "h100", **options})
    backend = aot_backend(chosen, lambda gm: seen.append(gm.graph), joins_in_place=joins)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(activation())
    return seen[0], compiled


def products(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target in (aten.mm.default, aten.addmm.default)]


def joins(graph: fx.Graph) -> list[fx.Node]:
    rules = (
        (n, n.meta.get("runlora", ""))
        for n in graph.find_nodes(op="call_function", target=aten.cat.default)
    )
    return [node for node, rule in rules if rule.startswith("stack")]


# -- what is made -------------------------------------------------------------------------------


def test_products_of_one_tensor_become_one_with_the_same_results() -> None:
    model = adapted()
    apart, _ = joint(model, joins=False)
    stacked, compiled = joint(model)
    assert not joins(apart)
    # The forward: q, k and v. The backward: the gradient of their input, and of the As.
    assert len(products(stacked)) <= len(products(apart)) - 4
    widths = [tuple(n.meta["val"].shape) for n in products(stacked)]
    assert any(shape[0] == TOKENS and shape[1] >= sum(SIZES[:2]) for shape in widths)
    joined = [tuple(node.meta["val"].shape) for node in joins(stacked)]
    assert (TOKENS, sum(SIZES)) in joined  # of dX = [dq | dk | dv] [Mq; Mk; Mv]
    assert_same_values(
        outputs_and_grads(compiled, [activation()]),
        outputs_and_grads(model, [activation()]),
        rtol=RTOL,
    )


@pytest.mark.parametrize(
    "is_compiled", (False, pytest.param(True, marks=pytest.mark.slow)), ids=("aot", "inductor")
)
def test_any_number_of_tokens_is_stacked(is_compiled: bool) -> None:
    """Sizes along which matrices are joined are numbers; all others may be symbols."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, seen = adapted(), list[fx.GraphModule]()
    backend = aot_backend(Options(strict=True, device="h100"), seen.append, joins_in_place=True)
    compiled = (
        torch.compile(model, backend="runlora", dynamic=True, options=ours(device="h100"))
        if is_compiled
        else torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    )
    for batch, length in ((4, TOKENS // 4), (3, 700)):
        x = torch.randn(batch, length, WIDTH, requires_grad=True)
        assert_same_values(
            outputs_and_grads(compiled, [x]), outputs_and_grads(model, [x]), rtol=RTOL
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    if is_compiled:
        report = runlora_fx.last_report()
        assert report is not None
        assert len(report.stacked) == 3
    else:
        # The forward: q, k and v. The backward: the gradient of their input, and of the As.
        joined = [tuple(map(str, n.meta["val"].shape)) for n in joins(seen[0].graph)]
        assert [cols for _, cols in joined].count(str(sum(SIZES))) == 1
        assert len(joined) == 3


def test_products_are_not_joined_along_a_symbolic_size() -> None:
    def fn(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return (x @ w).sin() * (y @ w).cos()

    x, w = torch.randn(64, 16), torch.randn(16, 32)
    backend = aot_backend(Options(strict=True, device="h100"), joins_in_place=True)
    compiled = torch.compile(fn, backend=backend, fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    for rows in (64, 48):
        given = x[:rows], 2 * x[:rows], w
        torch.testing.assert_close(compiled(*given), fn(*given))


def test_what_the_backward_keeps_stays_small() -> None:
    model = adapted()
    x = activation()
    given = [x, *model.parameters()]
    _, apart = joint(model)
    kept = saved_bytes(lambda: apart(x), given)
    # What the backward reads of q, k and v is their own, not the whole that they are parts of.
    frozen = adapted().requires_grad_(False)
    _, floor = joint(frozen)
    least = saved_bytes(lambda: floor(x), given)
    assert kept <= least + 4 * (len(SIZES) + 1) * TOKENS * RANK * 4


def test_products_and_pointwise_results_are_written_where_they_lie() -> None:
    torch._dynamo.reset()
    model = adapted()
    compiled = torch.compile(model, backend="runlora", options=ours(device="h100"))
    x = activation()
    _, (forward, *_) = run_and_get_code(compiled, x)
    # Merged weights are computed into parts of a buffer.
    merged = re.findall(r"extern_kernels\.addmm\(.*out=(\w+)\)", forward)
    parts = re.findall(r"(\w+) = reinterpret_tensor\(.*# alias", forward)
    assert len(set(merged) & set(parts)) >= 2
    assert_same_values(
        outputs_and_grads(compiled, [activation()]),
        outputs_and_grads(model, [activation()]),
        rtol=RTOL,
    )


def test_reports_say_how_many_products_run_as_one() -> None:
    report = runlora_fx.explain(adapted(), activation(), device="h100", strict=True)
    assert len(report.stacked) >= 2
    assert f"{sum(report.stacked)} products run as {len(report.stacked)}" in str(report)
    counted = runlora_fx.explain(adapted(), activation(), objective="flops", strict=True)
    assert counted.stacked == ()
    assert "run as" not in str(counted).replace("runs as", "")


# -- what is not --------------------------------------------------------------------------------


def test_nothing_is_stacked_where_flops_are_counted() -> None:
    graph, _ = joint(adapted(), objective="flops")
    assert not joins(graph)


@pytest.mark.parametrize("name", ("max_autotune", "max_autotune_gemm"))
def test_nothing_is_stacked_where_inductor_tunes_products(name: str) -> None:
    from runlora_fx._torch_compat import joins_in_place

    assert joins_in_place()
    with inductor_config.patch({name: True}):
        assert not joins_in_place()


def test_a_result_of_the_graph_lies_by_itself() -> None:
    class Results(Attention):
        def forward(self, h: Tensor) -> Any:
            return self.q(h), self.k(h).unsqueeze(0), torch.sin(self.v(h))

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, target_modules=["q", "k", "v"])
    model = get_peft_model(Results().requires_grad_(False), config)  # type: ignore[arg-type]
    randomise_lora_b(model)
    _, compiled = joint(model)
    found, wanted = compiled(activation()), model(activation())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=RTOL, atol=RTOL)
        assert one.stride() == other.stride()
    assert found[0].untyped_storage().data_ptr() != found[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("are_saved", (True, False), ids=("saved", "none alike"))
def test_what_is_tagged_otherwise_is_not_stacked(
    are_saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, _ = joint(adapted())
    assert joins(graph)
    found = Finder.found

    def with_tags(self: Finder) -> list[Any]:
        for i, product in enumerate(self._products.all):
            product.node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if are_saved else i
        stacks = found(self)
        for product in self._products.all:
            del product.node.meta["recompute"]
        return stacks

    monkeypatch.setattr(Finder, "found", with_tags)
    graph, _ = joint(adapted())
    assert not joins(graph)


# -- proofs -------------------------------------------------------------------------------------


def graph_of(fn: Callable[..., Any], *inputs: Tensor) -> fx.Graph:
    gm = make_fx(fn, tracing_mode="fake")(*inputs)
    return gm.graph


X, P, Q = torch.randn(6, 4), torch.randn(3, 4), torch.randn(5, 4)


def result(fn: Callable[..., Tensor], *inputs: Tensor) -> Any:
    graph = graph_of(fn, *inputs)
    (node,) = graph.output_node().all_input_nodes
    names = {n: n.name for n in graph.nodes}

    def named(key: Any) -> Any:
        if isinstance(key, fx.Node):
            return names[key]
        return tuple(map(named, key)) if isinstance(key, tuple) else key

    return {named(key): count for key, count in blocks_of(node).items()}


def test_a_block_is_read_through_joins_cuts_and_transposes() -> None:
    plain = result(lambda x, p, q: torch.mm(x, q.t()), X, P, Q)
    same = result(lambda x, p, q: torch.mm(x, torch.cat([p, q]).t())[:, 3:8].clone(), X, P, Q)
    assert same == plain
    added = result(
        lambda x, p, y, q: torch.mm(x, p) + torch.mm(y, q), X, P.t(), X.clone(), P.t().clone()
    )
    joined = result(
        lambda x, p, y, q: torch.mm(torch.cat([x, y], 1), torch.cat([p, q], 0)),
        *(X, P.t(), X.clone(), P.t().clone()),
    )
    assert joined == added


def test_only_a_transpose_turns_a_matrix() -> None:
    graph = graph_of(
        lambda x: [x.permute(1, 0) * 2, x.permute(0, 1) * 2, x.transpose(0, 1) * 2, x.t() * 2], X
    )
    found = [matrix_of(node.args[0], int) for node in graph.nodes if node.target is aten.mul.Tensor]
    assert [m is not None and m.turned for m in found] == [True, False, True, True]


def test_a_number_that_is_added_is_no_matrix() -> None:
    whole = result(lambda x, p: torch.mm(x, p.t()) + (torch.mm(x, p.t()) + 1), X, P)
    assert len(whole) == 2


def test_a_product_is_not_joined_with_what_it_reads() -> None:
    with torch.device("meta"):
        one, x = nn.Linear(8192, 8192, bias=False), torch.empty(4, 8192)
    report = runlora_fx.explain(nn.Sequential(one, one), x, device="h100", strict=True)
    assert not report.stacked


@pytest.mark.parametrize(
    "wrong",
    (
        lambda x, p, q: torch.mm(x, torch.cat([p, q]).t())[:, 2:7],
        lambda x, p, q: torch.mm(x, torch.cat([q, p]).t())[:, 3:8],
        lambda x, p, q: torch.mm(x, torch.cat([p, q + 1]).t())[:, 3:8],
        lambda x, p, q: torch.mm(x + 0, torch.cat([p, q]).t())[:, 3:8],
        lambda x, p, q: torch.mm(torch.cat([p, q]), x.t()).t()[:, 3:8] * 2,
    ),
)
def test_what_is_wrong_is_read_as_something_else(wrong: Callable[..., Tensor]) -> None:
    right = result(lambda x, p, q: torch.mm(x, q.t()), X, P, Q)
    assert result(wrong, X, P, Q) != right


def test_a_stack_that_is_wrong_is_not_put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Finder.found

    def corrupted(self: Finder) -> list[Any]:
        stacks = original(self)
        shared = next(stack for stack in stacks if isinstance(stack, Shared))
        object.__setattr__(shared, "products", shared.products[::-1])
        return stacks

    monkeypatch.setattr(Finder, "found", corrupted)
    with pytest.raises(Exception, match="stacked is not what it replaces"):
        joint(adapted())
    # Otherwise the graph stays as it was planned, and a warning says so.
    graph, _ = joint(adapted(), strict=False)
    assert not joins(graph)
