"""Inference: one layer without gradients, with adapters that stay unmerged.

    tasks(scale=8, device)["decode"]

Invariant: data and weights are random.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from measuring.recipes import task_of
from measuring.steps import Task, randomise
from runlora_fx.cli.layers import Recipe

#: By name: sequences, tokens of each at full size, adapters that are active.
SHAPES: dict[str, tuple[int, int, int]] = {
    "prefill": (4, 2048, 1),
    "decode": (4, 1, 1),
    "prefill, two adapters": (4, 2048, 2),
    "decode, two adapters": (4, 1, 2),
}


def task(name: str, scale: int, device: torch.device) -> Task:
    """The forward of a Llama-3-8B layer, at a fixed seed; widths and prompts are divided."""
    rows, length, adapters = SHAPES[name]
    made = task_of(Recipe(rows=rows, length=max(length, scale)), scale, device)
    adapted: Any = made.adapted
    if adapters == 2:
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        adapted.add_adapter("second", config)
        adapted.base_model.set_adapter(["default", "second"])
        randomise(adapted)
    x, positions = made.inputs
    inputs = (x.detach()[:, :length], positions[:, :length])
    return replace(made, adapted=adapted.eval(), frozen=made.frozen.eval(), inputs=inputs, dy=None)


def merged(model: nn.Module, task: Task) -> nn.Module:
    """The model with its adapters merged by PEFT: what inference costs without adapters."""
    apart: Any = copy.deepcopy(model)  # weights are shared with other contenders
    made: nn.Module = apart.merge_and_unload()
    return made
