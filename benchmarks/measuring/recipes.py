"""Recipes: one layer of a real model, as people train it, as a task.

    task_of(Recipe(dropout=0.05), scale=8, device)

Invariant: data and weights are random.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from measuring.steps import Task, randomise
from runlora_fx.cli.layers import SHAPES, Recipe, Shape, model_of


class Make(Protocol):
    """Makes the layer of a recipe."""

    def __call__(
        self, recipe: Recipe, shape: Shape, device: torch.device, *, is_adapted: bool
    ) -> nn.Module:
        """The layer with adapters, or the frozen one."""


def task_of(recipe: Recipe, scale: int, device: torch.device, make: Make = model_of) -> Task:
    """A training step of a layer in bfloat16, at a fixed seed; widths and tokens are divided."""
    torch.manual_seed(0)
    shape, length = SHAPES[recipe.shape].scaled(scale), max(1, recipe.length // scale)
    frozen = make(recipe, shape, device, is_adapted=False)
    adapted = make(recipe, shape, device, is_adapted=True)
    for model in (frozen, adapted):
        randomise(model)
    size = (recipe.rows, length, shape.width)
    x, dy = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(2))
    positions = torch.arange(length, device=device)[None]
    inputs = (x.requires_grad_(), positions)
    return Task(adapted, frozen, inputs, dy, recipe.dropout, recipe.autocast)


def about(recipe: Recipe, scale: int) -> str:
    """What is run of a layer."""
    return (
        f"{recipe.shape}, one layer, rank {recipe.rank}, bfloat16, {recipe.rows} x "
        f"{max(recipe.length // scale, 1)} tokens, widths / {scale}"
    )
