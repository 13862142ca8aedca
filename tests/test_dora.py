"""DoRA of PEFT and of torchtune: one graph, one product with the merged weight, no identity matrix.

``Y = X W' + (X W') diag(g - 1) + s (X A') B' diag(g)``, with ``g`` the magnitude over the norms of
the rows of ``W + s B A``, is ``X (W + s B A)' diag(g)``, and the norms need that weight anyway.
"""

from functools import cache
from typing import Any

import pytest
import torch
import torch._dynamo
from checks import (
    INDUCTOR,
    RUNLORA,
    RUNLORA_EAGER,
    assert_same_values,
    ours,
    outputs_and_grads,
    saved_bytes,
    scalar_kernels,
)
from market import randomise_lora_b
from peft import LoraConfig, get_peft_model
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import runlora_fx

RTOL = 1e-5
BATCH, SEQUENCE, WIDTH, FFN, RANK = 4, 60, 64, 96, 8
TOKENS = BATCH * SEQUENCE
LAYERS = 2
MERGING = 2 * RANK * WIDTH * FFN


class Mlp(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, FFN, bias=bias)
        self.down = nn.Linear(FFN, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def peft_model(*, bias: bool = False, dropout: float = 0.0, dora: bool = True) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=dropout,
        use_dora=dora,
        target_modules=["up", "down"],
    )
    model = get_peft_model(Mlp(bias), config)
    randomise_lora_b(model)
    scale_magnitudes(model)
    return model


def torchtune_model(*, bias: bool = False, dropout: float = 0.0) -> nn.Module:
    peft = pytest.importorskip("torchtune.modules.peft")
    torch.manual_seed(0)
    layers = [
        peft.DoRALinear(i, o, RANK, 2.0 * RANK, dropout=dropout, use_bias=bias)
        for i, o in ((WIDTH, FFN), (FFN, WIDTH))
    ]
    for layer in layers:
        nn.init.normal_(layer.lora_b.weight, std=0.02)
        layer.initialize_dora_magnitude()
        layer.weight.requires_grad_(False)
    model = nn.Sequential(layers[0], nn.GELU(), layers[1])
    scale_magnitudes(model)
    return model


@torch.no_grad()
def scale_magnitudes(model: nn.Module) -> None:
    """Magnitudes that differ from the norms: g is 1 in a fresh adapter."""
    for name, weight in model.named_parameters():
        if "magnitude" in name:
            weight.mul_(torch.linspace(0.8, 1.2, weight.numel()))


def activation() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, SEQUENCE, WIDTH, generator=generator, requires_grad=True)


def compiled(model: nn.Module, backend: str) -> Any:
    torch._dynamo.reset()
    options = None if backend == INDUCTOR else ours(objective="flops")
    # Without us PEFT's DoRA breaks the graph.
    return torch.compile(model, backend=backend, fullgraph=backend != INDUCTOR, options=options)


def report() -> runlora_fx.Report:
    last = runlora_fx.last_report()
    assert last is not None
    return last


BUILDERS = pytest.mark.parametrize("build", (peft_model, torchtune_model))


@BUILDERS
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("dropout", (0.0, 0.3))
@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
def test_one_graph_with_the_values_of_eager(
    build: Any, bias: bool, dropout: float, training: bool
) -> None:
    model, x = build(bias=bias, dropout=dropout).train(training), activation()
    run = compiled(model, RUNLORA_EAGER)
    values = []
    for fn in (model, run):
        torch.manual_seed(1)
        values.append(outputs_and_grads(fn, [x]))
    assert_same_values(values[1], values[0], RTOL)
    assert [site.changed for site in report().sites] == [True] * LAYERS
    with torch.no_grad():
        torch.manual_seed(2)
        wanted = model(x)
        torch.manual_seed(2)
        torch.testing.assert_close(run(x), wanted, rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize(("backend", "whole"), (("aot_eager", False), (RUNLORA_EAGER, True)))
def test_peft_breaks_no_graph_under_our_backends(backend: str, whole: bool) -> None:
    """And under others as often as without us: see `test_own_compilation.py`."""
    torch._dynamo.reset()
    counters.clear()
    torch.compile(peft_model(), backend=backend)(activation())
    assert (counters["stats"]["unique_graphs"] == 1) == whole
    assert (sum(counters["graph_break"].values()) == 0) == whole


@cache
def flops_of(*, dora: bool, training: bool) -> int:
    model, x = peft_model(dora=dora), activation()
    run = compiled(model, RUNLORA_EAGER)
    with torch.set_grad_enabled(training):
        run(x)
    return report().flops_after


@pytest.mark.parametrize("training", (True, False), ids=("train", "inference"))
def test_products_cost_no_more_than_loras_and_one_update_of_rank_r(training: bool) -> None:
    lora = flops_of(dora=False, training=training)
    assert flops_of(dora=True, training=training) <= lora + LAYERS * MERGING


@BUILDERS
def test_the_forward_is_one_product_with_one_merged_weight(build: Any) -> None:
    """Of each layer: B A, and X with W + s B A. The norms read the same merged weight."""
    with torch.no_grad():
        graph = runlora_fx.joint_graph(build(), (activation(),), objective="flops").graph
    products = [n for n in graph.nodes if n.target in MATMULS]
    flops = sum(map(flops_of_node, products))
    assert flops == LAYERS * (2 * TOKENS * WIDTH * FFN + MERGING)
    (norms,) = {str(n.target) for n in graph.nodes if "norm" in str(n.target)}
    merged = [n.args[0] for n in graph.nodes if str(n.target) == norms]
    used_in = [{*_products_that_read(node)} for node in merged]
    assert all(used_in)


MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def flops_of_node(node: fx.Node) -> int:
    left = node.args[1 if node.target is torch.ops.aten.addmm.default else 0]
    assert isinstance(left, fx.Node)
    return 2 * int(node.meta["val"].numel()) * int(left.meta["val"].shape[-1])


def _products_that_read(node: fx.Node) -> list[fx.Node]:
    """The products that read a tensor or its transpose."""
    found = []
    for user in node.users:
        if user.target in MATMULS:
            found.append(user)
        elif user.target is torch.ops.aten.permute.default:
            found += _products_that_read(user)
    return found


@scalar_kernels
def test_inductor_keeps_less_for_the_backward() -> None:
    """Base and adapter output of every layer were kept for dg; their sum is enough."""
    kept = {}
    for backend in (INDUCTOR, RUNLORA):
        model, x = peft_model(), activation()
        run = compiled(model, backend)
        wanted = outputs_and_grads(model, [x])
        assert_same_values(outputs_and_grads(run, [x]), wanted, RTOL)
        kept[backend] = saved_bytes(lambda run=run, x=x: run(x), [*model.parameters(), x])
    outputs = TOKENS * (WIDTH + FFN) * 4
    assert kept[RUNLORA] <= kept[INDUCTOR] - outputs


def test_quantised_weights_are_dequantised_as_before() -> None:
    """The substitute knows plain parameters only, and asks PEFT about all others."""
    from peft.utils import integrations

    class Hqq(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W_q = nn.Parameter(torch.zeros(2, 2))
            self.weight = torch.zeros(2, 2)

        def dequantize(self) -> Tensor:
            return self.W_q + 1

    torch._dynamo.reset()
    module = Hqq()
    run = torch.compile(
        lambda: 2 * integrations.dequantize_module_weight(module), backend=RUNLORA_EAGER
    )
    assert torch.equal(run(), torch.full((2, 2), 2.0))
