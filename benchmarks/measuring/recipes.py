"""Recipes: one layer of a real model, as people train it, as a task.

    task_of(Recipe(dropout=0.05), scale=8, device)

Invariant: data and weights are random.
"""

from __future__ import annotations

import torch

from measuring.steps import Task, randomise
from runlora_fx.cli.layers import SHAPES, Recipe, model_of


def task_of(recipe: Recipe, scale: int, device: torch.device) -> Task:
    """A training step of a layer in bfloat16, at a fixed seed; widths and tokens are divided."""
    torch.manual_seed(0)
    shape, length = SHAPES[recipe.shape].scaled(scale), max(1, recipe.length // scale)
    frozen = model_of(recipe, shape, device, is_adapted=False)
    adapted = model_of(recipe, shape, device, is_adapted=True)
    randomise(adapted)
    size = (recipe.rows, length, shape.width)
    x, dy = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(2))
    positions = torch.arange(length, device=device)[None]
    inputs = (x.requires_grad_(), positions)
    return Task(adapted, frozen, inputs, dy, recipe.dropout, recipe.autocast)
