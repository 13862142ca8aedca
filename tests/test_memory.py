"""What is held for the backward under each memory policy, against Inductor, and what it costs."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from checks import (
    INDUCTOR,
    RUNLORA,
    RUNLORA_EAGER,
    activation,
    assert_same_values,
    compiled,
    outputs_and_grads,
    saved_bytes,
    scalar_kernels,
)
from market import lora_layers, randomise_lora_b
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile

import runlora_fx
from runlora_fx.passes.emit.graph.kept import stop_keeping_what_escapes
from runlora_fx.passes.search.allowance import SHARE
from runlora_fx.runtime import kept_weights as reuse

RTOL = 1e-5
LAYERS, WIDTH, RANK, TOKENS = 4, 64, 16, 160
WEIGHT_BYTES = WIDTH * WIDTH * 4
BUDGET = {"memory": "fast", "memory_budget": LAYERS * WEIGHT_BYTES}


class Residual(nn.Module):
    """``x + gelu(linear(x))``: the layer's input lives on, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.gelu(self.linear(x))


#: Whether a CPU saves the state of its generator for masks that are drawn again, and no seeds.
SAVES_STATE = not torch.__version__.startswith(("2.11.", "2.12.", "2.13."))


def model_of(dropout: float = 0.0) -> PeftModel:
    torch.manual_seed(0)
    layers = nn.Sequential(*(Residual() for _ in range(LAYERS)))
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=dropout, target_modules=["linear"])
    model = get_peft_model(layers, config)
    randomise_lora_b(model)
    return model


def peak_bytes(step: Callable[[], object]) -> int:
    """The most memory that a step holds at once, over what was held before [B]."""
    with profile(profile_memory=True) as profiled:
        step()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@cache
@scalar_kernels
@functorch_config.patch(enable_autograd_cache=False)  # code from a cache has no report
def costs(dropout: float, backend: str, *policy: tuple[str, object]) -> tuple[int, int, int]:
    """Of a training step: bytes held for the backward, peak bytes, and planned FLOPs."""
    model, x = model_of(dropout), activation(TOKENS, WIDTH)
    run = compiled(model, backend, **dict(policy))

    def step() -> None:
        model.zero_grad()
        run(x).square().mean().backward()

    step()
    report = runlora_fx.last_report()
    assert backend == INDUCTOR or report is not None
    flops = 0 if report is None else report.flops_after
    held = saved_bytes(lambda: run(x), [*model.parameters(), x])
    return held, peak_bytes(step), flops


LOW = (("memory", "low"),)
FAST = tuple(BUDGET.items())


def test_balanced_holds_no_more_than_inductor() -> None:
    inductor, balanced = costs(0.0, INDUCTOR), costs(0.0, RUNLORA)
    # X A' of every layer is not kept: the merged weight needs none in the forward. X is made again
    # of what gelu keeps; that of the first layer is the graph's input.
    products, activations = LAYERS * TOKENS * RANK * 4, (LAYERS - 1) * TOKENS * WIDTH * 4
    assert balanced[0] == inductor[0] - products - activations
    assert balanced[1] <= inductor[1]


def test_low_holds_less_with_dropout_and_pays_in_flops() -> None:
    inductor, balanced, low = (
        costs(0.1, INDUCTOR),
        costs(0.1, RUNLORA),
        costs(0.1, RUNLORA, *LOW, ("objective", "flops")),
    )
    assert balanced[0] <= inductor[0]
    # Masks are drawn again, and what they mask is made again.
    masked, products = TOKENS * WIDTH * (1 + 4), TOKENS * RANK * 4
    seeds = len(torch.get_rng_state()) if SAVES_STATE else 8 * LAYERS
    assert low[0] == inductor[0] - LAYERS * (masked + products) + seeds
    assert low[1] < inductor[1]
    assert low[2] == balanced[2] + LAYERS * 2 * TOKENS * WIDTH * RANK


def test_low_takes_at_most_a_share_of_the_time_by_time() -> None:
    """X A' of all layers takes longer than the share. So some layers save it."""
    by_flops = costs(0.1, RUNLORA, *LOW, ("objective", "flops"))
    by_time = costs(0.1, RUNLORA, *LOW)
    products = TOKENS * RANK * 4
    more, rest = divmod(by_time[0] - by_flops[0], products)
    assert rest == 0
    assert 0 < more <= LAYERS
    balanced = costs(0.1, RUNLORA)[2]
    assert by_time[2] <= (1 + SHARE) * balanced < by_flops[2]


def test_fast_holds_merged_weights_within_the_budget_and_saves_their_flops() -> None:
    balanced = costs(0.0, RUNLORA, ("memory", "fast"), ("memory_budget", WEIGHT_BYTES - 1))
    merging = 2 * WIDTH * RANK * WIDTH
    for count in (1, 3, LAYERS):
        budget = count * WEIGHT_BYTES
        fast = costs(0.0, RUNLORA, ("memory", "fast"), ("memory_budget", budget))
        assert fast[0] == balanced[0] + budget
        assert fast[2] == balanced[2] - count * merging
    assert balanced[2] == costs(0.0, RUNLORA)[2]


@scalar_kernels
@pytest.mark.parametrize("policy", (LOW, FAST), ids=("low", "fast"))
@pytest.mark.parametrize("backend", (RUNLORA, RUNLORA_EAGER))
def test_values_do_not_depend_on_the_policy(
    backend: str, policy: tuple[tuple[str, object], ...]
) -> None:
    model, x = model_of(), activation(TOKENS, WIDTH)
    wanted = outputs_and_grads(model, [x])
    run = compiled(model, backend, **dict(policy))
    assert_same_values(outputs_and_grads(run, [x]), wanted, RTOL)


@scalar_kernels
def test_gradients_are_those_of_the_masks_of_the_forward() -> None:
    """With the same seed a small step along a direction changes the output by its derivative."""
    model, x = model_of(0.5), activation(TOKENS, WIDTH)
    run = compiled(model, RUNLORA, memory="low")
    run(x)
    weights, direction = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)

    def value(at: Tensor) -> Tensor:
        torch.manual_seed(1)
        result: Tensor = (run(at.detach().requires_grad_()) * weights).double().sum()
        return result

    torch.manual_seed(1)
    (gradient,) = torch.autograd.grad((run(x) * weights).sum(), x)
    wanted = (gradient.double() * direction).sum().item()
    step = 1e-2
    found = ((value(x + step * direction) - value(x - step * direction)) / (2 * step)).item()
    scale = (gradient.norm() * direction.norm()).item()
    assert abs(found - wanted) < 1e-3 * scale


@scalar_kernels
@pytest.mark.skipif(SAVES_STATE, reason="this torch draws other numbers where masks are not saved")
def test_masks_drawn_again_are_the_same_masks() -> None:
    """Gradients with dropout: against Inductor, which draws the same numbers and keeps them."""
    model, x = model_of(0.5), activation(TOKENS, WIDTH)
    values = []
    for backend, policy in ((INDUCTOR, {}), (RUNLORA, {"memory": "low"})):
        run = compiled(model, backend, **policy)
        run(x)
        torch.manual_seed(1)
        values.append(outputs_and_grads(run, [x]))
    assert_same_values(values[1], values[0], RTOL)


def test_generators_state_is_left_to_those_who_use_it() -> None:
    """Where random operators use the generator's state, masks are kept."""
    model, x = model_of(0.5), activation(TOKENS, WIDTH)
    with torch._inductor.config.patch(fallback_random=True):
        run = compiled(model, RUNLORA_EAGER, memory="low")
        torch.manual_seed(1)
        found = outputs_and_grads(run, [x])
        torch.manual_seed(1)
        assert_same_values(found, outputs_and_grads(model, [x]), RTOL)


# --- merged weights kept from call to call


class Kept:
    """Counts the merged weights that are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(reuse, "_merge", self._merge)

    def _merge(self, *args: Any) -> Tensor:
        self.count += 1
        base, left, right, alpha = args
        return torch.addmm(base, left, right, alpha=alpha)

    def since(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Kept:
    runlora_fx.forget_merged_weights()
    return Kept(monkeypatch)


def fused_step(model: PeftModel) -> None:
    """An optimizer whose kernel counts no versions."""
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2, fused=True)
    model(activation(TOKENS, WIDTH)).sum().backward()
    optimizer.step()


@torch.no_grad()
def in_place(model: PeftModel) -> None:
    for layer in lora_layers(model).values():
        layer.lora_A["default"].weight.mul_(1.5)


@torch.no_grad()
def base_in_place(model: PeftModel) -> None:
    for layer in lora_layers(model).values():
        layer.base_layer.weight.add_(0.01)


def load(model: PeftModel) -> None:
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


def new_data(model: PeftModel) -> None:
    for weight in model.parameters():
        weight.data = weight.data * 1.1


def edited_data(model: PeftModel) -> None:
    """Not seen by any counter: the user has to say so."""
    for weight in model.parameters():
        weight.data.mul_(1.1)
    assert runlora_fx.forget_merged_weights() == LAYERS * WEIGHT_BYTES


CHANGES = (fused_step, in_place, base_in_place, load, new_data, edited_data)


@pytest.mark.parametrize("backend", (RUNLORA_EAGER, RUNLORA))
@scalar_kernels
def test_merged_weights_are_made_once_until_something_changes(backend: str, made: Kept) -> None:
    model, x = model_of(), activation(2, WIDTH).detach()
    run = compiled(model, backend, **BUDGET, reuse=True)

    def check(expected: int) -> None:
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=RTOL, atol=RTOL)
        assert made.since() == expected

    with torch.no_grad():
        run(x)
    made.since()
    runlora_fx.forget_merged_weights()
    check(LAYERS)
    check(0)
    for change in CHANGES:
        change(model)
        check(LAYERS)
        check(0)


def test_another_adapter_takes_the_place_of_the_last(made: Kept) -> None:
    model, x = model_of(), activation(2, WIDTH).detach()
    model.add_adapter("other", LoraConfig(r=RANK, target_modules=["linear"]))
    randomise_lora_b(model)
    run = compiled(model, RUNLORA_EAGER, **BUDGET, reuse=True)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        for _ in range(2):
            with torch.no_grad():
                torch.testing.assert_close(run(x), model(x), rtol=RTOL, atol=RTOL)
    assert runlora_fx.forget_merged_weights() == LAYERS * WEIGHT_BYTES


def test_gradient_accumulation_merges_once(made: Kept) -> None:
    model, x = model_of(), activation(TOKENS, WIDTH)
    run = compiled(model, RUNLORA_EAGER, **BUDGET, reuse=True)
    run(x).sum().backward()
    in_place(model)
    model.zero_grad()
    made.since()
    for _ in range(3):
        run(x).square().mean().backward()
    assert made.since() == LAYERS  # for three forwards and three backwards
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for _ in range(3):
        model(x).square().mean().backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_weights_that_die_are_forgotten(made: Kept) -> None:
    base, left, right = torch.randn(8, 8), torch.randn(8, 2), torch.randn(2, 8)
    torch.ops.runlora.merged_weight(base, left, right, 1.0)
    del base
    other = torch.randn(4, 4)
    torch.ops.runlora.merged_weight(other, torch.randn(4, 2), torch.randn(2, 4), 1.0)
    assert runlora_fx.forget_merged_weights() == 4 * 4 * 4


@torch.inference_mode()
def test_tensors_without_versions_are_not_kept(made: Kept) -> None:
    args = torch.randn(4, 4), torch.randn(4, 2), torch.randn(2, 4), 0.5
    for _ in range(2):
        found = torch.ops.runlora.merged_weight(*args)
        torch.testing.assert_close(found, torch.addmm(*args[:3], alpha=0.5))
    assert runlora_fx.forget_merged_weights() == 0


#: Ways in which a merged weight leaves the graph, or is written to in it.
ESCAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda m: m,
    "a transpose": lambda m: m.t(),
    "a row": lambda m: m[0],
    "a view": lambda m: torch.ops.aten.view.default(m, [-1]),
    "an alias": lambda m: torch.ops.aten.alias.default(m.t()),
    "a copy that a compiler takes out": lambda m: m.clone(),
    "added to zero": lambda m: m + 0,
    "an update that a compiler makes in place": lambda m: m.index_fill(
        0, torch.tensor([0]), 1.0
    ).sum(),
}
ONLY_READ: dict[str, Callable[[Tensor], Tensor]] = {
    "multiplied": lambda m: m.t() @ m,
    "measured": lambda m: m.norm(dim=1),
    "scaled and multiplied": lambda m: (2 * m) @ m,
}


def _with_kept_weight(show: Callable[[Tensor], Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    def fn(w: Tensor, b: Tensor, a: Tensor) -> Tensor:
        return show(torch.ops.runlora.merged_weight(w, b, a, 2.0))

    inputs = [torch.randn(8, 8), torch.randn(8, 2), torch.randn(2, 8)]
    gm = make_fx(fn)(*inputs)
    stop_keeping_what_escapes(gm.graph, torch.ops.aten.addmm.default)
    gm.recompile()
    runlora_fx.forget_merged_weights()  # of tracing
    return gm, inputs


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_kept_weight_does_not_leave_the_graph(escape: str, made: Kept) -> None:
    gm, inputs = _with_kept_weight(ESCAPES[escape])
    wanted = gm(*inputs).clone()
    gm(*inputs).zero_()  # the user edits the output in place
    torch.testing.assert_close(gm(*inputs), wanted)
    assert runlora_fx.forget_merged_weights() == 0


@pytest.mark.parametrize("reader", ONLY_READ)
def test_a_weight_that_is_only_read_is_kept(reader: str, made: Kept) -> None:
    gm, inputs = _with_kept_weight(ONLY_READ[reader])
    gm(*inputs)
    assert runlora_fx.forget_merged_weights() == 4 * 8 * 8


def test_a_weight_made_of_one_that_is_not_kept_is_not_kept_either(made: Kept) -> None:
    merge = torch.ops.runlora.merged_weight

    def fn(w: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        first = merge(w, b, a, 1.0)
        return first, merge(first.t(), b, a, 1.0) @ w

    inputs = [torch.randn(8, 8), torch.randn(8, 2), torch.randn(2, 8)]
    gm = make_fx(fn)(*inputs)
    assert stop_keeping_what_escapes(gm.graph, torch.ops.aten.addmm.default) == 2


def test_reuse_belongs_to_fast() -> None:
    with pytest.raises(ValueError, match="memory='fast'"):
        runlora_fx.Options(reuse=True)
    with pytest.raises(ValueError, match="memory_budget"):
        runlora_fx.Options(memory="fast")
    with pytest.raises(ValueError, match="memory_budget"):
        runlora_fx.Options(memory_budget=1)
