"""Libraries that train: accelerate, torchtune, Lightning."""

import os
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from checks import INDUCTOR, RUNLORA
from market import lora_layers
from recipes import (
    FAST,
    Work,
    adapted,
    assert_all_found,
    check,
    run_recipe,
    tiny_llama,
    tokens,
    train,
    trainable,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import runlora_fx

BATCH = {"input_ids": tokens(), "labels": tokens()}


def _loader() -> Any:
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    return DataLoader(rows, batch_size=2)  # type: ignore[arg-type]


# --- accelerate


@pytest.fixture
def accelerator_state() -> Any:
    """accelerate keeps one state per process."""
    state = pytest.importorskip("accelerate.state").AcceleratorState
    state._reset_state(reset_partial_state=True)
    yield state
    state._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", (pytest.param("no", marks=pytest.mark.slow), "bf16"))
def test_accelerate_prepares_a_compiled_model(accelerator_state: Any, precision: str) -> None:
    from accelerate import Accelerator

    models = {}

    def run(backend: str) -> dict[str, Tensor]:
        accelerator_state._reset_state(reset_partial_state=True)
        model = models[backend] = adapted(tiny_llama())
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        run_recipe(
            "accelerate",
            backend,
            model=model,
            optimizer=torch.optim.SGD(weights, lr=1e-1),
            loader=_loader(),
            Accelerator=lambda **given: Accelerator(mixed_precision=precision, **given),
        )
        return trainable(model)

    ours, _ = check(run, 1e-5 if precision == "no" else 1e-2, backends=FAST)
    assert ours.work.graphs > 0
    # Under autocast the forward is wrapped: its modules keep their names.
    assert ours.modules == lora_layers(models[FAST[0]]).keys()


def test_accelerates_plugin_compiles_with_the_pass(accelerator_state: Any) -> None:
    from accelerate import Accelerator
    from accelerate.utils import TorchDynamoPlugin

    with pytest.raises(ValueError, match="'RUNLORA' is not a valid DynamoBackend"):
        TorchDynamoPlugin(backend="runlora")

    models = {}

    def run(backend: str) -> dict[str, Tensor]:
        accelerator_state._reset_state(reset_partial_state=True)
        model = models[backend] = adapted(tiny_llama())
        with inductor_config.patch(joint_custom_pre_pass=None):
            names = run_recipe(
                "plugin",
                backend,
                model=model,
                torch=torch,
                runlora_fx=runlora_fx,
                Accelerator=Accelerator,
                TorchDynamoPlugin=TorchDynamoPlugin,
            )
            if backend == INDUCTOR:
                inductor_config.joint_custom_pre_pass = None
            return {
                name.removeprefix("_orig_mod.").replace("grad _orig_mod.", "grad "): value
                for name, value in train(names["model"], BATCH).items()
            }

    ours, inductor = check(run)
    assert ours.work.graphs == 1
    assert ours.flops < inductor.flops
    assert_all_found(ours, models[RUNLORA])


# --- torchtune


NF4 = ("torchao.dtypes.nf4tensor", "torchao.quantization.quantize_.workflows.nf4.nf4_tensor")


def _torchtunes_compile_model() -> Any:
    """torchtune 0.6 needs a torchao of its time: names in it have moved, or are gone.

    What moved is put where torchtune looks for it. `torchtune.training` cannot be imported whole
    all the same; the file in which it compiles models can.
    """
    pytest.importorskip("torchao")
    old, new = NF4
    if find_spec(old) is None:
        sys.modules[old] = import_module(new)
    torchtune = pytest.importorskip("torchtune")
    path = Path(torchtune.__file__).parent / "training" / "_compile.py"
    spec = spec_from_file_location("torchtune_compile", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compile_model


def _torchtune_model() -> nn.Module:
    from torchtune.models.llama2 import lora_llama2
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    torch.manual_seed(0)
    model = lora_llama2(
        ["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        vocab_size=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        intermediate_dim=64,
        max_seq_len=64,
        lora_rank=4,
        lora_alpha=8,
    )
    set_trainable_params(model, get_adapter_params(model))
    for name, weight in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(weight, std=0.02)
    return model


def test_torchtunes_variable_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_model = _torchtunes_compile_model()
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "")  # restored after the recipe has set it

    def run(backend: str) -> dict[str, Tensor]:
        model = _torchtune_model()
        run_recipe("torchtune", backend, os=os, compile_model=compile_model, model=model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        values: dict[str, Tensor] = {}
        for step in range(3):
            logits = model(tokens())
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens(seed=1).flatten())
            loss.backward()
            values |= {f"logits {step}": logits.detach(), f"loss {step}": loss.detach()}
            for name, weight in model.named_parameters():
                if weight.grad is not None:
                    values[f"grad {step} {name}"] = weight.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
        return values | trainable(model)

    ours, _ = check(run, backends=FAST)
    # The first layer is one by itself: its input needs no gradient.
    assert ours.work == Work(graphs=2, breaks=0, recompiles=1)
    assert all(report.flops_after < report.flops_before for report in ours.reports)
    linears = {"q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3"}
    assert {name.split(".")[-1] for name in ours.modules} == linears


# --- Lightning


@pytest.mark.parametrize(
    "how", ("torch.compile", pytest.param("configure_model", marks=pytest.mark.slow))
)
def test_lightning(how: str) -> None:
    lightning = pytest.importorskip("lightning")
    models = {}

    def run(backend: str) -> dict[str, Tensor]:
        model = models[backend] = adapted(tiny_llama())
        trainer = lightning.Trainer(
            max_steps=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        if how == "configure_model":
            given = {"lightning": lightning, "torch": torch, "trainer": trainer}
            run_recipe("lightning", backend, model=model, loader=_loader(), **given)
        else:
            module = _finetuning(lightning)(model)
            trainer.fit(torch.compile(module, backend=backend), _loader())
        assert trainer.global_step == 3
        return trainable(model)

    ours, _ = check(run, backends=FAST)
    assert ours.work.graphs > 0
    assert_all_found(ours, models[FAST[0]])


def _finetuning(lightning: Any) -> Any:
    class Finetuning(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    return Finetuning
