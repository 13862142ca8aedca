"""The numerics policies: what each may round, against fp64.

In the bounds, u is the unit roundoff of the dtype and the sums of absolute values are those of the
exact products: |X| |W'| + s |X| |A'| |B'|, the scale that any order of evaluation rounds at.
"""

import math

import pytest
import torch
from checks import (
    RUNLORA,
    RUNLORA_EAGER,
    ours,
    outputs_and_grads,
    relative_error,
    scalar_kernels,
)
from market import MODELS
from torch import Tensor, nn

import runlora_fx

TOKENS, WIDTH, RANK, SCALING = 128, 32, 8, 2.0
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
POLICIES = ("strict", "default", "relaxed")
EXAMPLES = torch.Generator().manual_seed(0)


class Layer(nn.Module):
    """``x W' + s (x A') B'`` with adapters in a dtype of their own."""

    def __init__(self, base: torch.dtype, adapters: torch.dtype, delta: float = 1.0) -> None:
        super().__init__()
        w = torch.randn(WIDTH, WIDTH, generator=EXAMPLES) / math.sqrt(WIDTH)
        a = torch.randn(RANK, WIDTH, generator=EXAMPLES) / math.sqrt(WIDTH)
        b = delta * torch.randn(WIDTH, RANK, generator=EXAMPLES) / math.sqrt(RANK)
        self.w = nn.Parameter(w.to(base), requires_grad=False)
        self.a, self.b = nn.Parameter(a.to(adapters)), nn.Parameter(b.to(adapters))

    def forward(self, x: Tensor) -> Tensor:
        down = x.to(self.a.dtype) @ self.a.t()
        y = x @ self.w.t() + SCALING * (down @ self.b.t())
        return y.to(x.dtype)


def activation(dtype: torch.dtype) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=EXAMPLES).to(dtype).requires_grad_()


def run(layer: nn.Module, x: Tensor, numerics: str) -> tuple[dict[str, Tensor], runlora_fx.Report]:
    torch._dynamo.reset()
    options = ours(numerics=numerics)
    compiled = torch.compile(layer, backend=RUNLORA_EAGER, fullgraph=True, options=options)
    values = outputs_and_grads(compiled, [x])
    report = runlora_fx.last_report()
    assert report is not None
    return values, report


def exact(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    double = Layer(torch.float64, torch.float64)
    double.load_state_dict(layer.state_dict())
    return outputs_and_grads(double, [x.detach().double().requires_grad_()])


def magnitude(layer: Layer, x: Tensor) -> Tensor:
    """|X| |W'| + s |X| |A'| |B'|, element by element."""
    w, a, b, x = (t.detach().double().abs() for t in (layer.w, layer.a, layer.b, x))
    return x @ w.t() + SCALING * (x @ a.t() @ b.t())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_outputs_stay_within_the_documented_bound(dtype: torch.dtype, policy: str) -> None:
    layer, x = Layer(dtype, dtype), activation(dtype)
    values, report = run(layer, x, policy)
    error = (values["output 0"].double() - exact(layer, x)["output 0"]).abs()
    # Sums are accumulated in fp32 or better: their own rounding is WIDTH + RANK times smaller.
    u, accumulated = UNIT_ROUNDOFF[dtype], (WIDTH + RANK) * 2.0**-24
    assert (error <= (4 * u + accumulated) * magnitude(layer, x)).all()
    # The bound is about a merged weight: 128 tokens are more than it takes to merge.
    merged = "W" in report.sites[0].after and report.sites[0].changed
    assert merged == (policy != "strict" or dtype == torch.float32)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_strict_is_bitwise_what_came(dtype: torch.dtype) -> None:
    """Below 32 bits nothing is materialised that was not: the same products of the same values."""
    layer, x = Layer(dtype, dtype), activation(dtype)
    values, _ = run(layer, x, "strict")
    came = outputs_and_grads(layer, [x])
    for name, value in came.items():
        if "input" not in name:  # two addends of dX are added in fp32, where eager rounds both
            assert relative_error(values[name], value) <= UNIT_ROUNDOFF[dtype], name


@pytest.mark.parametrize("policy", POLICIES)
def test_only_relaxed_crosses_casts(policy: str) -> None:
    layer, x = Layer(torch.bfloat16, torch.float32), activation(torch.bfloat16)
    values, report = run(layer, x, policy)
    assert report.sites[0].changed == (policy == "relaxed")
    wanted = exact(layer, x)
    u = UNIT_ROUNDOFF[torch.bfloat16]
    error = (values["output 0"].double() - wanted["output 0"]).abs()
    assert (error <= (4 * u + (WIDTH + RANK) * 2.0**-24) * magnitude(layer, x)).all()
    # Gradients of fp32 adapters are rounded to bf16 under relaxed, and to fp32 otherwise.
    for name in ("gradient of a", "gradient of b"):
        assert values[name].dtype == torch.float32
        assert relative_error(values[name], wanted[name]) <= (4 * u if policy == "relaxed" else u)


@pytest.mark.parametrize("policy", ("strict", "default"))
def test_gradients_that_autocast_widens_are_joined(policy: str) -> None:
    """Autocast adds up ``fp32(dY W) + fp32(dZ A)``; the default merges, as in the forward.

    Weights and activation are bf16 numbers here, so that only the products round, and dY.
    """
    layer = Layer(torch.bfloat16, torch.bfloat16).float()
    layer.w.requires_grad_(False)
    x = activation(torch.bfloat16).detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        values, report = run(layer, x, policy)
    assert ("dX = dY M" in report.sites[0].after) == (policy == "default")
    wanted, u = exact(layer, x), UNIT_ROUNDOFF[torch.bfloat16]
    dy = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).double().abs()
    w, a, b = (t.detach().double().abs() for t in (layer.w, layer.a, layer.b))
    scale = dy @ w + SCALING * (dy @ b @ a)
    error = (values["gradient of input 0"].double() - wanted["gradient of input 0"]).abs()
    assert values["gradient of input 0"].dtype == torch.float32
    assert (error <= (5 * u + (WIDTH + RANK) * 2.0**-24) * scale).all()


def test_a_merged_update_is_rounded_with_the_weight() -> None:
    """What the default gives up in bf16: an update of less than half an ulp of W is lost in Y.

    The gradients do not pass the merged weight, and keep it.
    """
    layer, x = Layer(torch.bfloat16, torch.bfloat16, delta=2.0**-12), activation(torch.bfloat16)
    update = {}
    for policy in ("strict", "default"):
        values, _ = run(layer, x, policy)
        base = x.detach().double() @ layer.w.detach().double().t()
        update[policy] = values["output 0"].double() - base
        for name in ("gradient of a", "gradient of b"):
            assert relative_error(values[name], exact(layer, x)[name]) <= 2.0**-6
    # Neither can be told from the rounding of Y itself.
    rounding = UNIT_ROUNDOFF[torch.bfloat16] * magnitude(layer, x)
    for policy in update:
        assert (update[policy].abs() <= 3 * rounding).all()


@torch._inductor.config.patch(fx_graph_cache=False)
@torch._functorch.config.patch(enable_autograd_cache=False)
@scalar_kernels
def deterministic_run(backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Losses and parameters of three steps, compiled anew."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    layer = Layer(dtype, dtype)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 8)
    model = nn.Sequential(nn.Dropout(0.1), layer, nn.Dropout(0.1))
    x = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    options = ours(objective="flops")
    run = torch.compile(model, backend=backend, fullgraph=True, options=options)
    optimizer = torch.optim.SGD((layer.a, layer.b), lr=0.1)
    seen = []
    for _ in range(3):
        loss = run(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen += [loss.detach(), layer.a.detach().clone(), layer.b.detach().clone()]
    report = runlora_fx.last_report()
    assert report is not None and any(site.changed for site in report.sites)
    return seen


@pytest.mark.parametrize(
    ("backend", "dtype"), [(RUNLORA, torch.float32), (RUNLORA_EAGER, torch.bfloat16)]
)
def test_deterministic_runs_are_equal_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    """With torch's deterministic algorithms, two compilations train to the same bits."""
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (deterministic_run(backend, dtype) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not first[1].equal(first[4])  # it does train
    assert all(one.equal(two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "policy",
    [pytest.param(p, marks=pytest.mark.slow if p == "relaxed" else ()) for p in POLICIES],
)
def test_models_train_under_every_policy(policy: str) -> None:
    """bf16 base with fp32 adapters, as PEFT makes it: errors against fp64 as eager's."""
    case = MODELS["llama"]
    model = case.model(8, torch.bfloat16, adapter_dtype=torch.float32)
    reference = case.model(8, torch.float64)
    reference.load_state_dict(model.state_dict())
    batch = case.batch()
    wanted = reference(**batch).loss
    eager = abs(model(**batch).loss.item() - wanted.item())
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend=RUNLORA_EAGER, fullgraph=True, options=ours(numerics=policy)
    )
    loss = compiled(**batch).loss
    loss.backward()
    assert abs(loss.item() - wanted.item()) <= eager + 4 * UNIT_ROUNDOFF[torch.bfloat16]
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == torch.float32
        for p in model.parameters()
        if p.requires_grad
    )
