"""Low-rank chains on the optimizer's side: LoRA-Pro and Flora, in the order that papers write them.

The functions come from `examples/flavours`. Counted is what the rewritten graphs multiply, and that
the large matrices of the written order are not made.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import (
    MATMULS,
    RUNLORA,
    RUNLORA_EAGER,
    assert_same_values,
    counting,
    matmul_flops,
    ours,
    scalar_kernels,
)
from flavours_table import TABLE, VERSIONS, parse_steps, step_rows
from market import randomise_lora_b
from optimizer_steps import (
    RTOL,
    SCALING,
    STEPS,
    TOKENS,
    M,
    N,
    R,
    Step,
    flora,
    flora_inputs,
    lora_pro,
    random,
    traced,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import runlora_fx

every_step = pytest.mark.parametrize("name", STEPS)


def values(outputs: Any) -> dict[str, Tensor]:
    return {f"output {i}": y for i, y in enumerate(tree_leaves(outputs))}


def product_shapes(graph: fx.Graph) -> set[tuple[int, ...]]:
    """Shapes of all matrix products, without regard to orientation."""
    products = [n for n in graph.nodes if str(getattr(n.target, "overloadpacket", "")) in MATMULS]
    return {tuple(sorted(node.meta["val"].shape)) for node in products}


@every_step
def test_rewrite_finds_the_cheapest_order(name: str) -> None:
    step = STEPS[name]
    gm, inputs = traced(step)
    assert tuple(sorted(step.avoided)) in product_shapes(gm.graph)
    assert matmul_flops(gm.graph) > step.flops
    rewritten = runlora_fx.rewrite(gm, inputs, strict=True)
    assert tuple(sorted(step.avoided)) not in product_shapes(rewritten.graph)
    assert matmul_flops(rewritten.graph) <= step.flops
    assert_same_values(values(rewritten(*inputs)), values(step.run(*step.inputs)), RTOL)


@every_step
@scalar_kernels
def test_the_backend_finds_the_cheapest_order(name: str) -> None:
    step = STEPS[name]
    torch._dynamo.reset()
    with counting() as flops:
        compiled = torch.compile(step.run, backend=RUNLORA, fullgraph=True, options=ours())
        found = values(compiled(*step.inputs))
    assert_same_values(found, values(step.run(*step.inputs)), RTOL)
    assert len(flops) == 1
    assert flops[0] <= step.flops


@pytest.mark.parametrize("name", ("momentum", "update"))
def test_single_products_are_left_alone(name: str) -> None:
    """Of a gradient that exists, and of C P, there is only one order."""
    run, inputs = {
        "momentum": (flora.momentum_step, [random(M, R), random(M, N), random(R, N), 0.9]),
        "update": (flora.update, [random(M, N), random(M, R), random(R, N), 0.1]),
    }[name]
    gm, tensors = traced(Step("", run, inputs, 0, (0, 0)))
    rewritten = runlora_fx.rewrite(gm, tensors, strict=True)
    assert matmul_flops(rewritten.graph) == matmul_flops(gm.graph)
    assert rewritten.code == runlora_fx.rewrite(rewritten, tensors, strict=True).code


def test_lora_pro_trains_a_model_as_in_eager_mode() -> None:
    """Three steps of a PEFT model; model and optimizer are compiled apart."""

    def train(compile: Callable[[Callable[..., Any]], Callable[..., Any]]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(N, M), nn.GELU(), nn.Linear(M, N))
        config = LoraConfig(r=R, lora_alpha=SCALING * R, target_modules=["0", "2"])
        model = get_peft_model(layers, config)
        randomise_lora_b(model)
        model.double()
        run, correct = compile(model), compile(lora_pro.corrected_by_sylvester)
        x, target = random(TOKENS, N), random(TOKENS, N, seed=1)
        losses = []
        for _ in range(3):
            loss = (run(x) - target).square().mean()
            losses.append(loss.detach())
            loss.backward()
            for layer in model.get_base_model().children():
                if not hasattr(layer, "lora_A"):
                    continue
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                with torch.no_grad():
                    grads = correct(a, b, a.grad, b.grad, SCALING)
                    for weight, grad in zip((a, b), grads, strict=True):
                        weight -= 1e-3 * grad
            model.zero_grad()
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        assert losses[2] < losses[0]
        return {**trained, "losses": torch.stack(losses)}

    torch._dynamo.reset()
    found = train(lambda f: torch.compile(f, backend=RUNLORA_EAGER, fullgraph=True, options=ours()))
    assert_same_values(found, train(lambda f: f), 1e-9)


def test_flora_trains_a_model_as_in_eager_mode() -> None:
    """Algorithm 1: two micro-batches are accumulated, then the weights move; P is drawn anew."""

    def train(accumulate: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        weights, *_, x, target = flora_inputs()
        for step in range(3):
            projections = {
                name: random(R, weights[name].shape[1], seed=step) / R**0.5
                for name in ("up", "down")
            }
            kept = {name: torch.zeros_like(weights[name][:, :R]) for name in projections}
            for half in range(2):
                rows = slice(half, None, 2)
                kept = accumulate(weights, kept, projections, x[rows], target[rows])
            weights = {
                name: flora.update(w, kept[name], projections[name], lr=1e-3) if name in kept else w
                for name, w in weights.items()
            }
        return weights

    torch._dynamo.reset()
    backend: Any = {"backend": RUNLORA_EAGER, "fullgraph": True, "options": ours()}
    found = train(torch.compile(flora.accumulate, **backend))
    assert_same_values(found, train(flora.accumulate), RTOL)


# --- the identity as an addend


def _projected(b: Tensor, g: Tensor) -> Any:
    return (torch.eye(len(b), dtype=b.dtype) - b @ b.T) @ g


def _projector_is_a_result(b: Tensor, g: Tensor) -> Any:
    projector = torch.eye(len(b), dtype=b.dtype) - b @ b.T
    return projector @ g, projector


def _shifted_chain(b: Tensor, g: Tensor) -> Any:
    """The identity is an addend of a root that is written anew."""
    return 0.5 * torch.eye(len(b), dtype=b.dtype) + b @ b.T @ g @ g.T


def _left_alone_next_to_changed(b: Tensor, g: Tensor) -> Any:
    """One region keeps its projector while the sum that it is part of changes."""
    left, right = (torch.eye(n, dtype=b.dtype) for n in g.shape)
    return (left - b @ b.T) @ g @ (right + g.T @ g)


@pytest.mark.parametrize(
    "fn", (_projected, _projector_is_a_result, _shifted_chain, _left_alone_next_to_changed)
)
@pytest.mark.parametrize("columns", (R, M + 1))
@pytest.mark.parametrize("level", ("make_fx", "backend"))
def test_sums_with_the_identity_keep_their_values(
    fn: Callable[..., Any], columns: int, level: str
) -> None:
    inputs = [random(M, R) / M**0.5, random(M, columns) / M**0.5]
    if level == "make_fx":
        gm = make_fx(fn)(*inputs)
        rewritten: Callable[..., Any] = runlora_fx.rewrite(gm, inputs, strict=True)
        assert matmul_flops(rewritten.graph) <= matmul_flops(gm.graph)  # type: ignore[attr-defined]
    else:
        torch._dynamo.reset()
        rewritten = torch.compile(fn, backend=RUNLORA_EAGER, fullgraph=True, options=ours())
    assert_same_values(values(rewritten(*inputs)), values(fn(*inputs)), RTOL)
    report = runlora_fx.last_report()
    assert report is not None
    str(report)  # the identity can be printed


# --- the published table


def test_the_published_table_agrees() -> None:
    """`docs/flavours.md` says what is counted here."""
    text = TABLE.read_text(encoding="utf-8")
    if VERSIONS not in text:
        pytest.skip(f"the table was not made with {VERSIONS}")
    assert parse_steps(text) == step_rows()
