"""PEFT's adapters on expert weights (`target_parameters`), in mixtures of experts of transformers.

PEFT merges the stacks of all experts in every forward. Where tokens pick the weights of their
experts, few tokens take the split form instead.
"""

import pytest
import torch
from checks import (
    INDUCTOR,
    RUNLORA,
    RUNLORA_EAGER,
    assert_same_outputs_and_grads,
    assert_same_values,
    compile_whole,
    ours,
    run_training,
    saved_bytes,
)
from mixtures import EXPERTS, FFN, HIDDEN, MODELS, RANK, adapted, batch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx
from trainings import Products, without_kernels

import runlora_fx

RTOL = 1e-5
STEPS = 3


@pytest.fixture(autouse=True)
def _no_memory_of_other_tests() -> None:
    """Dynamo makes a size symbolic that it has seen change; such graphs keep their merges."""
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODELS)
def test_trains_in_one_graph_as_in_eager_mode(name: str) -> None:
    """Three steps; under Inductor alone PEFT breaks the graph in every layer."""

    def train(model: nn.Module, run: nn.Module) -> list[dict[str, Tensor]]:
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        found = []
        for _ in range(STEPS):
            values = run_training(run, batch())
            optimizer.step()
            found.append({**values, **{n: p.detach().clone() for n, p in model.named_parameters()}})
        return found

    model = adapted(name, "batched_mm")
    wanted = train(model, model)
    model = adapted(name, "batched_mm")
    counters.clear()
    found = train(model, compile_whole(model, RUNLORA_EAGER))
    assert counters["stats"]["unique_graphs"] == 1
    for mine, eager in zip(found, wanted, strict=True):
        assert_same_values(mine, eager, RTOL)


def merges(graph: fx.Graph) -> int:
    """How often an adapter is added to the weights of all experts, or their gradient is made."""
    shapes = ([EXPERTS, HIDDEN, FFN], [EXPERTS, HIDDEN, 2 * FFN])
    found = [node for node in graph.nodes if node.target in MERGES]
    return sum(sorted(node.meta["val"].shape) in map(sorted, shapes) for node in found)


MERGES = (
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.index_put.default,
)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids).logits
        return logits


# Each token picks two experts, whose gate and up projections are one matrix: splitting pays in
# inference up to 4 * 64 * 128 / (64 + 128) = 170 picks for "down", 204 for "gate and up".
@pytest.mark.parametrize(("tokens", "merged"), ((8, 0), (90, 1), (160, 2)))
def test_few_tokens_split_the_merged_weights(tokens: int, merged: int) -> None:
    model = Logits(adapted("mixtral", "batched_mm").eval())
    ids = batch(tokens // 2)["input_ids"]
    with torch.no_grad():
        graph = runlora_fx.joint_graph(model, (ids,), strict=True)
    assert merges(graph.graph) == merged


def test_training_makes_no_gradient_of_all_experts() -> None:
    graph = runlora_fx.joint_graph(
        Logits(adapted("mixtral", "batched_mm")), (batch()["input_ids"],), strict=True
    )
    assert merges(graph.graph) == 0


def test_strict_numerics_merge_as_the_model_does() -> None:
    model = Logits(adapted("mixtral", "batched_mm").eval())
    with torch.no_grad():
        graph = runlora_fx.joint_graph(
            model, (batch()["input_ids"],), strict=True, numerics="strict"
        )
    assert merges(graph.graph) == 2


def test_a_step_costs_less_and_keeps_less() -> None:
    """Of the weights that tokens pick nothing is kept: they are picked again."""
    model = adapted("mixtral", "batched_mm")
    wanted = run_training(model, batch())
    given = [*model.parameters(), *model.buffers(), *batch().values()]
    saved = {}
    for backend in (INDUCTOR, RUNLORA):
        products = Products()
        with without_kernels(products):
            # Without us PEFT breaks the graph.
            whole = compile_whole if backend == RUNLORA else torch.compile
            compiled = whole(model, backend=backend)
            assert_same_values(run_training(compiled, batch()), wanted, RTOL)
            saved[backend] = saved_bytes(lambda run=compiled: run(**batch()), given)
    with Products() as in_eager_mode:
        run_training(model, batch())
    assert products.flops < in_eager_mode.flops
    # Inductor keeps those of "down": the input of "gate and up" needs no gradient.
    picked = 4 * 2 * batch()["input_ids"].numel() * HIDDEN * FFN
    assert saved[RUNLORA] < saved[INDUCTOR] - 0.9 * picked


# --- the rule itself


class Picked(nn.Module):
    """``(W + 2 L R)[k]`` times a column, or a row times it, or its transpose."""

    def __init__(self, *, from_left: bool, transposed: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.weight = random(EXPERTS, HIDDEN, FFN).requires_grad_(False)
        self.left, self.right = random(EXPERTS, HIDDEN, RANK), random(EXPERTS, RANK, FFN)
        self.from_left, self.transposed = from_left, transposed

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        picked = torch.baddbmm(self.weight, self.left, self.right, alpha=2.0)[k]
        picked = picked.mT if self.transposed else picked
        product = (
            torch.bmm(picked, x[:, :, None]) if self.from_left else torch.bmm(x[:, None], picked)
        )
        return product.flatten(1)


@pytest.mark.parametrize("from_left", (False, True))
@pytest.mark.parametrize("transposed", (False, True))
def test_values_and_gradients_of_picked_weights(from_left: bool, transposed: bool) -> None:
    model = Picked(from_left=from_left, transposed=transposed)
    generator = torch.Generator().manual_seed(1)
    width = FFN if from_left != transposed else HIDDEN
    x = torch.randn(6, width, generator=generator, dtype=torch.float64).requires_grad_(True)
    k = torch.tensor([3, 0, 0, 2, 3, 3])
    joint = runlora_fx.joint_graph(model, (x, k), strict=True)
    assert merges(joint.graph) == 0
    compiled = torch.compile(model, backend=RUNLORA_EAGER, fullgraph=True, options=ours())
    assert_same_outputs_and_grads(model, compiled, [x, k], 1e-12)


def test_a_merged_weight_that_is_needed_anyway_is_picked_from() -> None:
    def fn(weight: Tensor, left: Tensor, right: Tensor, k: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        merged = torch.baddbmm(weight, left, right)
        return torch.bmm(merged[k], x), merged.norm()

    model = Picked(from_left=True, transposed=False)
    x, k = torch.randn(2, FFN, 1, dtype=torch.float64), torch.tensor([1, 1])
    inputs = [model.weight, model.left.detach(), model.right.detach(), k, x]
    gm = make_fx(fn)(*inputs)
    assert merges(runlora_fx.rewrite(gm, inputs, strict=True).graph) == 1
