"""Inference: one layer without gradients, with adapters that stay unmerged.

    task("decode", scale=8, device)

In a mixed batch every sample has an adapter of its own. PEFT takes their names (``adapter_names``),
and registers hooks that pass them on. ``tabled`` stacks the adapters into tables, which samples
index.

Invariant: data and weights are random.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from measuring import recipes
from measuring.libraries import each_replaced
from measuring.steps import Task, randomise
from runlora_fx.cli.layers import Recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "flavours"))
from per_sample import PerSampleLora


@dataclass(frozen=True)
class Batch:
    """What a layer is called with.

    Attributes:
        rows: Sequences.
        length: Tokens of each at full size.
        adapters: How many there are.
        is_mixed: Whether each sample has one of them; else all are active for all samples.
    """

    rows: int = 4
    length: int = 2048
    adapters: int = 1
    is_mixed: bool = False

    def about(self, scale: int) -> str:
        """What is run."""
        recipe = Recipe(rows=self.rows, length=self.length)
        mixed = f", {self.adapters} adapters, one for each sample" if self.is_mixed else ""
        return recipes.about(recipe, scale) + mixed


BATCHES: dict[str, Batch] = {
    "prefill": Batch(),
    "decode": Batch(length=1),
    "prefill, two adapters": Batch(adapters=2),
    "decode, two adapters": Batch(length=1, adapters=2),
    "prefill, mixed batch": Batch(rows=8, length=1024, adapters=4, is_mixed=True),
    "decode, mixed batch": Batch(rows=64, length=1, adapters=4, is_mixed=True),
}


class Mixed(nn.Module):
    """A PEFT model that is called with the names of its samples' adapters."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """Take a model and a name for each sample."""
        super().__init__()
        self.model, self.names = model, list(names)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """The model's output for x (rows, length, width)."""
        result: Tensor = self.model(x, positions, adapter_names=self.names)
        return result


class Table(PerSampleLora):
    """A linear layer with a table of adapters, and each sample's place in it."""

    def __init__(self, layer: Any, names: Sequence[str]) -> None:
        """Take the numbers of a PEFT layer."""
        known = list(layer.lora_A)
        scaling = layer.scaling[known[0]]
        super().__init__(layer.base_layer, len(known), layer.r[known[0]], scaling)
        for name in ("lora_A", "lora_B"):
            factors = [getattr(layer, name)[adapter].weight.detach() for adapter in known]
            setattr(self, name, nn.Parameter(torch.stack(factors), requires_grad=False))
        places = torch.tensor([known.index(name) for name in names])
        self.register_buffer("places", places.to(layer.base_layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """``x (rows, length, in)`` to ``(rows, length, out)``."""
        return super().forward(x, self.places)


def task(batch: Batch, scale: int, device: torch.device) -> Task:
    """The forward of a Llama-3-8B layer, at a fixed seed; widths and prompts are divided."""
    recipe = Recipe(rows=batch.rows, length=max(batch.length, scale))
    made = recipes.task_of(recipe, scale, device)
    adapted: Any = made.adapted
    known = ["default", *(f"adapter {at}" for at in range(1, batch.adapters))]
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    for name in known[1:]:
        adapted.add_adapter(name, config, autocast_adapter_dtype=False)
    randomise(adapted)
    if batch.is_mixed:
        adapted = Mixed(adapted, [known[at % len(known)] for at in range(batch.rows)])
    else:
        adapted.base_model.set_adapter(known)
    x, positions = made.inputs
    length = max(1, batch.length // scale)
    inputs = (x.detach()[:, :length], positions[:, :length])
    return replace(made, adapted=adapted.eval(), frozen=made.frozen.eval(), inputs=inputs, dy=None)


def merged(model: nn.Module, task: Task) -> nn.Module:
    """The model with its adapters merged by PEFT: what inference costs without adapters."""
    apart: Any = copy.deepcopy(model)  # weights are shared with other contenders
    made: nn.Module = apart.merge_and_unload()
    return made


def tabled(model: Any, task: Task) -> nn.Module:
    """The layer of a mixed batch with tables of adapters instead of names."""
    return each_replaced(model.model.get_base_model(), partial(Table, names=model.names)).eval()
