"""Optimizer steps: LoRA-Pro (arXiv 2407.18242) and Flora (arXiv 2402.03293), without a PEFT model.

    STEPS["LoRA-Pro"][1](8, device)

The functions are those of ``examples/flavours``, which multiply from left to right as the papers
do.

Invariant: data and weights are random.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from measuring.steps import Task
from runlora_fx.cli.layers import SHAPES

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "flavours"))
import flora
import lora_pro

RANK, SCALING = 16, 2.0

#: Some layers' tensors to what a step makes of them.
Tensors = Callable[..., list[Tensor]]


class Function(nn.Module):
    """A function of tensors as a model without parameters."""

    def __init__(self, function: Tensors) -> None:
        """Take the function."""
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """What the function makes."""
        return self.function(*inputs)


def layers(scale: int) -> list[tuple[int, int]]:
    """Outputs and inputs of the projections of a Llama-3-8B layer, divided."""
    shape = SHAPES["Llama-3-8B"].scaled(scale)
    width, inner, narrow = shape.width, shape.inner, shape.width * shape.groups // shape.heads
    q, k, up, down = (width, width), (narrow, width), (inner, width), (width, inner)
    return [q, k, k, q, up, up, down]


def of_layers(step: Tensors, count: int) -> Tensors:
    """A step of one layer, which takes so many tensors, for the tensors of all layers."""

    def run(*inputs: Tensor) -> list[Tensor]:
        groups = (inputs[at : at + count] for at in range(0, len(inputs), count))
        return [made for group in groups for made in step(*group)]

    return run


def lora_pro_step(scale: int, device: torch.device) -> Task:
    """The gradients of all adapters of a layer, corrected (arXiv 2407.18242, theorem 2.3)."""
    draw = _drawing(device)

    def tensors() -> Iterator[Tensor]:
        for m, n in layers(scale):
            yield from (draw(RANK, n), draw(m, RANK), draw(RANK, n), draw(m, RANK))

    corrected = partial(lora_pro.corrected_by_sylvester, scaling=SCALING)
    return _function(of_layers(corrected, 4), tuple(tensors()))


def flora_momentum(scale: int, device: torch.device) -> Task:
    """A step with a new subspace for all weights of a layer (arXiv 2402.03293, algorithm 2)."""
    draw = _drawing(device)

    def step(w: Tensor, gradient: Tensor, momentum: Tensor, old: Tensor, p: Tensor) -> list[Tensor]:
        moved = flora.resample(momentum, old, p)
        made = flora.momentum_step(moved, gradient, p, 0.9)
        return [made, flora.update(w, made, p, 1e-3)]

    def tensors() -> Iterator[Tensor]:
        for m, n in layers(scale):
            yield from (draw(m, n), draw(m, n), draw(m, RANK), draw(RANK, n), draw(RANK, n))

    return _function(of_layers(step, 5), tuple(tensors()))


def flora_accumulation(scale: int, device: torch.device) -> Task:
    """Forward, backward and projection of a micro-batch (arXiv 2402.03293, algorithm 1)."""
    draw = _drawing(device)
    shape, tokens = SHAPES["Llama-3-8B"].scaled(scale), 8192 // scale
    width, inner = shape.width, shape.inner

    def step(
        up: Tensor, bias: Tensor, down: Tensor, x: Tensor, target: Tensor, *kept: Tensor
    ) -> list[Tensor]:
        weights = {"up": up, "up_bias": bias, "down": down}
        sums, projections = (
            dict(zip(("up", "down"), kept[at : at + 2], strict=True)) for at in (0, 2)
        )
        return list(flora.accumulate(weights, sums, projections, x, target).values())

    model = (draw(inner, width), draw(inner), draw(width, inner))
    data = (draw(tokens, width), draw(tokens, width))
    kept = (draw(inner, RANK), draw(width, RANK), draw(RANK, width), draw(RANK, inner))
    return _function(step, (*model, *data, *kept))


def _drawing(device: torch.device) -> Callable[..., Tensor]:
    """Draws float32 tensors, at a fixed seed, with rows of about unit length."""
    torch.manual_seed(0)
    return lambda *size: torch.randn(size, device=device) / math.sqrt(size[-1])


def _function(function: Tensors, inputs: tuple[Tensor, ...]) -> Task:
    model = Function(function)
    return Task(model, model, inputs, dy=None)


def about(what: str, scale: int) -> str:
    """What a step is."""
    return (
        f"{what}, rank {RANK}, float32, widths and tokens / {scale}. There is no PEFT model: under "
        "the names of PEFT runs the function as it is written"
    )


STEPS: dict[str, tuple[str, Callable[[int, torch.device], Task]]] = {
    "LoRA-Pro": (
        "The corrected gradients of all adapters of a Llama-3-8B layer",
        lora_pro_step,
    ),
    "Flora, accumulation": (
        "Forward, backward and projected gradients of two layers of Llama-3-8B",
        flora_accumulation,
    ),
    "Flora, momentum": (
        "A new subspace, momenta and weights of a Llama-3-8B layer's projections",
        flora_momentum,
    ),
}
