"""The model that all engines train, its batches, and the eager training of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests import market
from tests.market import MODELS, SEQUENCE, VOCAB

#: Optimizer steps, rows of the global batch, rank of the adapters, the learning rate.
STEPS, ROWS, RANK, RATE = 3, 4, 4, 0.5


def adapted() -> Any:
    """A Llama of two layers with adapters on its seven linear layers; always the same weights."""
    return MODELS["llama"].model(RANK).train()


def batch(step: int) -> dict[str, Tensor]:
    """The global batch of a step: ids and labels (ROWS, SEQUENCE)."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(3, VOCAB, (ROWS, SEQUENCE), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def share(whole: Mapping[str, Tensor], part: int, parts: int) -> dict[str, Tensor]:
    """The rows of one rank."""
    return {name: value.chunk(parts)[part] for name, value in whole.items()}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Plain SGD on the adapters: rounding errors are not blown up as by Adam."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


def train(
    step: Callable[[Mapping[str, Tensor]], float | None],
    model: nn.Module,
    first: int = 0,
    then: Callable[[int], None] = lambda step: None,
) -> list[float | None]:
    """Train; the loss of every step.

    Args:
        step: Runs forward and backward of a global batch, or of this rank's part of it.
        model: What holds the parameters.
        first: The first step.
        then: Is called after every step.
    """
    optimizer, losses = optimizer_of(model), []
    for i in range(first, STEPS):
        losses.append(step(batch(i)))
        optimizer.step()
        optimizer.zero_grad()
        then(i)
    return losses


def plain_step(
    run: Callable[..., Any], part: int = 0, parts: int = 1
) -> Callable[[Mapping[str, Tensor]], float]:
    """A step on the rows of one rank."""

    def step(whole: Mapping[str, Tensor]) -> float:
        loss = run(**share(whole, part, parts)).loss
        loss.backward()
        return float(loss.item())

    return step


def evaluated(model: nn.Module) -> float:
    """The loss on a batch that was not trained on, in eager mode."""
    with torch.no_grad():
        return float(model(**batch(STEPS)).loss)


def alone() -> dict[str, Any]:
    """One process in eager mode: its losses, and that of the trained model on another batch."""
    model = adapted()
    return {"losses": train(plain_step(model), model), "evaluated": evaluated(model)}


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of the model."""
    found = [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
    assert len(found) == market.LAYERS
    return found
