"""Ways to train that change which gradients exist, or when the forward runs.

Layers that share an input (q/k/v, gate/up) and grouped queries are Llama's, biases GPT-2's and
OPT's: `test_models.py` covers them.
"""

from collections import OrderedDict

import market
import pytest
import torch
from checks import (
    INDUCTOR,
    RUNLORA,
    RUNLORA_EAGER,
    assert_same_outputs_and_grads,
    assert_same_values,
    compile_training,
    compile_whole,
    counting,
    outputs_and_grads,
    run_training,
    scalar_kernels,
)
from market import FFN, HIDDEN, MODELS, randomise_lora_b
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import runlora_fx

TOKENS = 96
RTOL = 1e-5


def _mlp(rank: int = 8, **lora: float) -> PeftModel:
    """Two adapted linear layers with a GELU in between: HIDDEN -> FFN -> HIDDEN."""
    torch.manual_seed(0)
    layers = OrderedDict(up=nn.Linear(HIDDEN, FFN), act=nn.GELU(), down=nn.Linear(FFN, HIDDEN))
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=["up", "down"], **lora)
    model = get_peft_model(nn.Sequential(layers), config)
    randomise_lora_b(model)
    return model


def _tokens(*, requires_grad: bool) -> Tensor:
    x = torch.randn(2, TOKENS // 2, HIDDEN, generator=torch.Generator().manual_seed(0))
    return x.requires_grad_(requires_grad)


@scalar_kernels
def _flops(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Check a training step against eager; return its matmul FLOPs, rewritten and as it came."""
    flops = []
    for backend in (INDUCTOR, RUNLORA):
        with counting() as counted:
            compiled = compile_whole(model, backend)
            assert_same_outputs_and_grads(model, compiled, [x], RTOL)
        flops.append(sum(counted))
    inductor, ours = flops
    return ours, inductor


@pytest.mark.parametrize("rank", (8, 64))
@pytest.mark.parametrize("base_trains", (False, True), ids=("base frozen", "base trains"))
@pytest.mark.parametrize("input_grad", (False, True), ids=("input frozen", "input gradient"))
def test_gradients_that_may_be_absent(rank: int, base_trains: bool, input_grad: bool) -> None:
    model = _mlp(rank)
    for name, weight in model.named_parameters():
        if "base_layer" in name:
            weight.requires_grad_(base_trains)
    x = _tokens(requires_grad=input_grad)
    ours, inductor = _flops(model, x)
    assert ours <= inductor


def test_a_trained_base_weight_gives_the_gradient_of_its_adapter() -> None:
    """With G = X^T dY at hand, dA and dB cost products of weights only, not of activations."""
    model = _mlp(rank=8)
    for weight in model.parameters():
        weight.requires_grad_(True)
    x = _tokens(requires_grad=True)
    ours, inductor = _flops(model, x)
    assert ours < inductor


def test_two_active_adapters() -> None:
    model = _mlp(rank=8)
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=4, target_modules=["up", "down"]))
    randomise_lora_b(model)
    model.base_model.set_adapter(["default", "second"])
    x = _tokens(requires_grad=True)
    assert any("second" in name for name in outputs_and_grads(model, [x]))
    ours, inductor = _flops(model, x)
    assert ours <= inductor


def test_two_active_adapters_in_a_model() -> None:
    case, dtype = MODELS["llama"], torch.float64
    model = case.model(8, dtype)
    second = LoraConfig(r=4, lora_alpha=4, target_modules=list(case.targets))
    model.add_adapter("second", second)
    randomise_lora_b(model)
    model.to(dtype)
    model.base_model.set_adapter(["default", "second"])
    wanted = run_training(model, case.batch(dtype))
    compiled = compile_whole(model, RUNLORA_EAGER)
    assert_same_values(run_training(compiled, case.batch(dtype)), wanted, 1e-11)


@scalar_kernels
def test_dropout_keeps_its_mask() -> None:
    """With dropout the adapter sees another input than the base layer: there is nothing to merge.

    Inductor draws other random numbers than eager does, so it is the reference, from the same seed.
    """
    model, x = _mlp(rank=8, lora_dropout=0.5).train(), _tokens(requires_grad=True)
    values, flops = {}, {}
    for backend in (INDUCTOR, RUNLORA):
        with counting() as counted:
            compiled = compile_whole(model, backend)
            torch.manual_seed(1)
            values[backend] = outputs_and_grads(compiled, [x])
        flops[backend] = sum(counted)
    assert_same_values(values[RUNLORA], values[INDUCTOR], RTOL)
    assert flops[RUNLORA] <= flops[INDUCTOR]

    eager = outputs_and_grads(model.eval(), [x])
    with pytest.raises(AssertionError, match="relative error"):
        assert_same_values(values[RUNLORA], eager, 1e-2)  # dropout was on


def test_dropout_in_evaluation_is_merged() -> None:
    """In evaluation dropout(x) is a copy of x: the adapter sees what the base layer sees."""
    model, x = _mlp(rank=64, lora_dropout=0.5).eval(), _tokens(requires_grad=True)
    ours, inductor = _flops(model, x)
    assert ours < inductor
    report = runlora_fx.last_report()
    assert report is not None
    assert all(site.changed for site in report.sites)


@pytest.mark.slow
def test_gradient_checkpointing_saves_no_more_than_inductor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(market, "LAYERS", 1)
    case = MODELS["llama"]
    model, batch = case.model(8), case.batch()
    wanted = run_training(model, batch)
    not_checkpointed = compile_training(model, batch, INDUCTOR)

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # A hook on the embeddings that only reentrant checkpoints need; it breaks the graph.
    model.disable_input_require_grads()
    inductor, ours = (compile_training(model, batch, backend) for backend in (INDUCTOR, RUNLORA))
    assert_same_values(ours.values, wanted, RTOL)
    assert inductor.saved < not_checkpointed.saved
    assert ours.saved <= inductor.saved
    assert ours.flops <= inductor.flops
