"""Scalings: what the incoming graph writes only to scale it is priced, so plans scale less."""

from pathlib import Path

import pytest
import torch
from checks import relative_error
from conftest import FLOPS_BOUND
from market import randomise_lora_b
from peft import LoraConfig, get_peft_model
from torch import Tensor, fx, nn

import runlora_fx
from runlora_fx import Options
from runlora_fx.aot import aot_backend
from runlora_fx.cli.crossover.problem import lora_problem
from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices.machine import DTYPES, key_of
from runlora_fx.cost_model.objective import Objective
from runlora_fx.cost_model.published import PUBLISHED
from runlora_fx.cost_model.store import Record
from runlora_fx.passes.levels.operators import VIEWS
from runlora_fx.passes.search.decide import decide
from runlora_fx.passes.search.frontiers import search

aten = torch.ops.aten
TOKENS, WIDTH, RANK = 96, 64, 4


class Layers(nn.Module):
    """Two layers: each has an input that needs a gradient, and an output that is not the result."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.two(torch.sigmoid(self.one(torch.sigmoid(x)))))


def adapted(width: int = WIDTH, alpha: int = 2 * RANK) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=alpha, lora_dropout=0.5, target_modules=["one", "two"])
    model: nn.Module = get_peft_model(Layers(width), config)
    randomise_lora_b(model)
    return model


def joint(model: nn.Module, options: Options) -> fx.Graph:
    torch._dynamo.reset()
    seen: list[fx.Graph] = []
    backend = aot_backend(options, lambda gm: seen.append(gm.graph), joins_in_place=True)
    torch.compile(model, backend=backend, fullgraph=True)(
        torch.randn(TOKENS, WIDTH, requires_grad=True)
    )
    return seen[0]


def scaled_for_products(graph: fx.Graph, by: float) -> list[fx.Node]:
    """What has a row for each token and is multiplied by a number for a product."""

    def is_read_by_a_product(node: fx.Node) -> bool:
        return any(
            user.target is aten.mm.default or (user.target in VIEWS and is_read_by_a_product(user))
            for user in node.users
        )

    return [
        node
        for node in graph.find_nodes(op="call_function", target=aten.mul.Tensor)
        if node.args[1] == by
        and tuple(node.meta["val"].shape) == (TOKENS, WIDTH)
        and is_read_by_a_product(node)
    ]


@pytest.fixture
def _bytes_are_slow(no_profile: Path) -> None:
    for dtype in DTYPES:
        store.add(key_of(torch.device("cpu"), dtype), Record({**FLOPS_BOUND, "elementwise": 1e-9}))


@pytest.mark.usefixtures("_bytes_are_slow")
def test_gradients_of_outputs_are_not_scaled() -> None:
    came = joint(adapted(), Options(objective="flops", strict=True))
    assert len(scaled_for_products(came, by=2)) == 2  # dY of each layer
    planned = joint(adapted(), Options(strict=True))
    assert not scaled_for_products(planned, by=2)


def test_a_scaling_by_one_is_none() -> None:
    report = runlora_fx.explain(adapted(alpha=RANK), torch.randn(TOKENS, WIDTH), device="h100")
    assert not any(site.changed for site in report.sites)


def test_large_layers_with_dropout_gain_on_a_gpu() -> None:
    """Small ones do not: a launch takes longer than writing what is scaled."""
    with torch.device("meta"):
        large, x = adapted(width=8192), torch.empty(8192, 8192)
    report = runlora_fx.explain(large, x, device="h100", strict=True)
    assert any(site.changed for site in report.sites)
    assert report.flops_after == report.flops_before
    small = runlora_fx.explain(adapted(), torch.randn(TOKENS, WIDTH), device="h100", strict=True)
    assert not any(site.changed for site in small.sites)


@pytest.mark.usefixtures("_bytes_are_slow")
def test_results_are_those_of_eager_mode() -> None:
    """The masks of both are equal: they are drawn alike from one seed."""
    model, x = adapted(), torch.randn(TOKENS, WIDTH, requires_grad=True)
    seen: list[fx.Graph] = []
    backend = aot_backend(Options(strict=True), lambda gm: seen.append(gm.graph))
    found = []
    for run in (model, torch.compile(model, backend=backend, fullgraph=True)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model.zero_grad()
        run(x).square().sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append(grads)
    wanted, mine = found
    assert wanted.keys() == mine.keys() and wanted
    assert max(relative_error(mine[k], wanted[k]) for k in wanted) < 1e-5
    assert not scaled_for_products(seen[0], by=2)


def test_the_launches_of_scalings_decide_between_plans() -> None:
    """The search itself does not see them: near a border another plan is cheaper with them."""
    objective = Objective("time", 0.0, PUBLISHED["h100"].profile("bfloat16"))
    chosen = set()
    for tokens in range(3600, 4200, 50):
        problem = lora_problem(tokens, 4096, 4096, 16, dtype="bfloat16", itemsize=2)
        decision = decide(problem, objective)
        prices = [objective.total(a.plan.operations(problem)) for a in decision.alternatives]
        assert decision.plan is not None
        assert objective.total(decision.plan.operations(problem)) <= min(prices) * (1 + 1e-9)
        chosen.add(search(problem, objective).plan.signature == decision.plan.signature)
    assert chosen == {True, False}
