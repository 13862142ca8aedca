"""Products of the forward that the backward computes again: only under "low", and by price."""

import pytest
import torch
from checks import (
    INDUCTOR,
    RUNLORA,
    activation,
    assert_same_values,
    compiled,
    counting,
    outputs_and_grads,
    saved_bytes,
)
from market import randomise_lora_b
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RTOL = 1e-5
WIDTH, NARROW, RANK, TOKENS = 64, 16, 8, 640


class Gate(nn.Module):
    """``h + wide(n) + out(sin(narrow(n)))`` with ``n = norm(h)``: narrow's result is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, WIDTH, bias=False)
        self.narrow = nn.Linear(WIDTH, NARROW, bias=False)
        self.out = nn.Linear(NARROW, WIDTH, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        n = self.norm(h)
        made: Tensor = self.out(self.narrow(n).sin())
        return h + self.wide(n) + made


def frozen() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Gate(), Gate()).requires_grad_(False)


def adapted(dropout: float = 0.0) -> nn.Module:
    config = LoraConfig(r=RANK, lora_dropout=dropout, target_modules=["wide"])
    model = get_peft_model(frozen(), config)
    randomise_lora_b(model)
    return model


def kept_and_flops(model: nn.Module, backend: str, **policy: object) -> tuple[int, int]:
    """What a forward holds for the backward [B], and the products of a step [FLOP]."""
    x = activation(TOKENS, WIDTH)
    with counting() as flops:
        run = compiled(model, backend, **policy)
        run(x).sum().backward()
    return saved_bytes(lambda: run(x), [*model.parameters(), x]), sum(flops)


def test_low_keeps_less_than_a_frozen_model_at_no_more_flops_than_inductor() -> None:
    floor, _ = kept_and_flops(frozen(), INDUCTOR)
    _, most = kept_and_flops(adapted(), INDUCTOR)
    kept, flops = kept_and_flops(adapted(), RUNLORA, memory="low")
    assert kept < floor
    assert flops <= most


def test_balanced_recomputes_no_product() -> None:
    floor, _ = kept_and_flops(frozen(), INDUCTOR)
    _, most = kept_and_flops(adapted(), INDUCTOR)
    _, low = kept_and_flops(adapted(), RUNLORA, memory="low")
    kept, flops = kept_and_flops(adapted(), RUNLORA)
    assert kept >= floor and flops < low <= most


def test_where_plans_save_no_time_no_product_is_recomputed() -> None:
    """An adapter of a dropped-out input is not merged."""
    floor, _ = kept_and_flops(frozen(), INDUCTOR)
    kept, _ = kept_and_flops(adapted(0.1), RUNLORA, memory="low")
    assert kept >= floor


@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_values_are_the_same(dropout: float) -> None:
    """With dropout, in the mode that drops nothing."""
    model, x = adapted(dropout).train(not dropout), activation(TOKENS, WIDTH)
    wanted = outputs_and_grads(model, [x])
    found = outputs_and_grads(compiled(model, RUNLORA, memory="low"), [x])
    assert_same_values(found, wanted, RTOL)


class Checkpointed(nn.Module):
    """A part of a model that the user checkpoints."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, h: Tensor) -> Tensor:
        made: Tensor = checkpoint(self.inner, h, use_reentrant=False)
        return made


class Last(nn.Module):
    """Ends in an adapted layer: its gradient needs the layer's input, and not its output."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        made: Tensor = self.wide(h.sigmoid())
        return made


def checkpointed(inner: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(Checkpointed(inner()), Checkpointed(inner())).requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=RANK, target_modules=["wide"]))
    randomise_lora_b(model)
    return model


def test_checkpoints_keep_what_they_kept() -> None:
    inductor, _ = kept_and_flops(checkpointed(Gate), INDUCTOR)
    kept, _ = kept_and_flops(checkpointed(Gate), RUNLORA, memory="low")
    assert kept <= inductor


@pytest.mark.parametrize("inner", (Gate, Last))
def test_no_checkpoint_recomputes_more(inner: type[nn.Module]) -> None:
    """A stack of a checkpoint's last product and of X A' would have the backward run both."""
    _, most = kept_and_flops(checkpointed(inner), INDUCTOR)
    _, flops = kept_and_flops(checkpointed(inner), RUNLORA)
    assert flops < most
