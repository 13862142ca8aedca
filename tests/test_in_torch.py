"""What torch itself offers: whole and regional compilation, export, activation checkpoints."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor_config
from checks import INDUCTOR, RUNLORA, RUNLORA_EAGER, assert_same_values, saved_bytes
from market import randomise_lora_b
from peft import LoraConfig, get_peft_model
from recipes import (
    EAGER,
    FAST,
    REAL,
    RECIPES,
    Work,
    adapted,
    assert_all_found,
    check,
    gradients,
    run_recipe,
    tiny_llama,
    tokens,
    train,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import runlora_fx

HERE = Path(__file__).parent
BATCH = {"input_ids": tokens(), "labels": tokens()}


def test_a_whole_model() -> None:
    models = {}

    def run(backend: str) -> dict[str, Tensor]:
        torch.manual_seed(1)
        given = {"get_peft_model": get_peft_model, "LoraConfig": LoraConfig, "base": tiny_llama()}
        model = models[backend] = run_recipe("whole", backend, **given)["model"]
        assert not any("_orig_mod" in name for name in model.state_dict())
        randomise_lora_b(model)
        return train(model, BATCH)

    ours, inductor = check(run)
    assert ours.work.graphs == 1
    assert ours.flops < inductor.flops
    assert_all_found(ours, models[RUNLORA])


def test_equal_blocks_are_compiled_once() -> None:
    def run(backend: str) -> dict[str, Tensor]:
        model = adapted(tiny_llama(layers=3))
        run_recipe("regional", backend, model=model)
        return train(model, BATCH)

    ours, inductor = check(run)
    # The first block is one by itself: its input needs no gradient.
    assert ours.work == Work(graphs=2, breaks=0, recompiles=1)
    assert ours.flops < inductor.flops


def test_a_base_compiled_before_its_adapters() -> None:
    """It is compiled at its first call, and by then the adapters are in it."""
    models = {}

    def run(backend: str) -> dict[str, Tensor]:
        base = tiny_llama()
        base.compile(backend=backend)
        model = models[backend] = adapted(base, task_type="CAUSAL_LM")
        return train(model, BATCH, steps=1)

    ours, _ = check(run, backends=FAST)
    assert ours.work == Work(graphs=1, breaks=0, recompiles=0)
    assert_all_found(ours, models[RUNLORA_EAGER])


def test_activation_checkpoints_of_transformers() -> None:
    saved = {}

    def run(backend: str) -> dict[str, Tensor]:
        model = adapted(tiny_llama(), lora_dropout=0.2).train()
        run_recipe("checkpointing", backend, model=model)
        torch.manual_seed(2)
        values = train(model, BATCH)
        given = [*model.parameters(), *model.buffers(), *BATCH.values()]
        saved[backend] = saved_bytes(lambda: model(**BATCH), given)
        return values

    # Eager's random numbers, so that the masks are its own.
    with inductor_config.patch(fallback_random=True):
        ours, _ = check(run, backends=FAST)
    assert ours.work == Work(graphs=1, breaks=0, recompiles=0)
    ours_saved, other_saved = (saved[backend] for backend in FAST)
    assert ours_saved <= other_saved


class _Checkpointed(nn.Module):
    """Two blocks `x + down(gelu(up(x)))`, each under an activation checkpoint of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(OrderedDict(up=nn.Linear(32, 64), act=nn.GELU(), down=nn.Linear(64, 32)))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize(
    ("backends", "reference"), [(FAST, EAGER), (REAL, INDUCTOR)], ids=("eager", "inductor")
)
def test_activation_checkpoints_of_torch(backends: tuple[str, str], reference: str) -> None:
    """With dropout: Inductor draws its own random numbers, or eager's where it is told to."""
    x = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    saved = {}

    def run(backend: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = adapted(_Checkpointed(), target_modules=["up", "down"], lora_dropout=0.2)
        model.compile(backend=backend)
        torch.manual_seed(1)
        output = model(x)
        output.sin().sum().backward()
        values = {"output": output.detach(), **gradients(model)}
        saved[backend] = saved_bytes(lambda: model(x), [*model.parameters(), x])
        return values

    with inductor_config.patch(fallback_random=reference == EAGER):
        ours, _ = check(run, 1e-5, backends=backends, reference=reference)
    assert ours.work == Work(graphs=1, breaks=0, recompiles=0)
    ours_saved, other_saved = (saved[backend] for backend in backends)
    assert ours_saved <= other_saved


def test_an_exported_model_is_rewritten() -> None:
    model = adapted(tiny_llama()).get_base_model().eval()
    inputs = tokens()
    names = run_recipe(
        "export", RUNLORA, torch=torch, runlora_fx=runlora_fx, model=model, inputs=inputs
    )
    report = runlora_fx.last_report()
    assert report is not None
    counted, values = {}, {}
    for name in ("exported", "rewritten"):
        with FlopCounterMode(display=False) as counter:
            values[name] = {"logits": names[name](inputs).logits}
        counted[name] = counter.get_total_flops()
    assert_same_values(values["rewritten"], {"logits": model(inputs).logits}, 1e-5)
    assert counted["rewritten"] < counted["exported"]
    assert counted["exported"] - counted["rewritten"] == report.flops_before - report.flops_after


def test_every_recipe_is_run() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in HERE.glob("test_in_*.py"))
    assert RECIPES
    assert [name for name in RECIPES if f'"{name}"' not in sources] == []
