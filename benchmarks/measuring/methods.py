"""Methods: training steps that are more than one call of one adapted layer.

    METHODS["siamese encoder"].make(8, device)

Models are cut as in ``models``, and not scaled.

Invariant: data and weights are random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from measuring import optimizers
from measuring.models import Cut, task_of
from measuring.steps import Task, once

TEMPERATURE = 0.05

#: Training steps of a cycle of ReLoRA.
STEPS = 4

ENCODER = Cut("roberta", 768, 3072, 12, 12, 16, torch.float32, rows=16, length=128)
LLAMA = Cut("llama", 768, 2560, 16, 24, 128, torch.float32, rows=1, length=1024)


@dataclass(frozen=True)
class Method:
    """A method: what is said of it, and what makes its task.

    Attributes:
        about: What a step is.
        make: Of a scale and a device.
        is_model: Whether a step runs a PEFT model.
    """

    about: Callable[[int], str]
    make: Callable[[int, torch.device], Task]
    is_model: bool = True


class Siamese(nn.Module):
    """The contrastive loss of one encoder on two inputs: a pair's rows belong together."""

    def __init__(self, encoder: nn.Module) -> None:
        """Take an encoder of (rows, length, width)."""
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, other: Tensor, positions: Tensor) -> Tensor:
        """The cross entropy of the rows' cosines."""
        a, b = (
            nn.functional.normalize(self.encoder(rows, positions).mean(1), dim=-1)
            for rows in (x, other)
        )
        pairs = torch.arange(len(a), device=a.device)
        return nn.functional.cross_entropy(a @ b.t() / TEMPERATURE, pairs)


def siamese(scale: int, device: torch.device) -> Task:
    """A training step of a siamese encoder."""
    made = task_of(ENCODER, device)
    x, positions = made.inputs
    return replace(
        made,
        adapted=Siamese(made.adapted).train(),
        frozen=Siamese(made.frozen).train(),
        inputs=(x, torch.randn_like(x).detach(), positions),
        dy=torch.ones((), device=device),
    )


def relora(scale: int, device: torch.device) -> Task:
    """A cycle of ReLoRA (arXiv 2307.05695)."""
    made = task_of(LLAMA, device)
    return replace(made, run=cycle, is_base_shared=False)


def cycle(model: nn.Module, task: Task) -> list[Tensor]:
    """Training steps with AdamW, and a merge and restart in the middle; the last step's output."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = None
    outputs: list[Tensor] = []
    for at in range(STEPS):
        if at == STEPS // 2:
            merge_and_restart(model)
        if at in (0, STEPS // 2) and trained:
            optimizer = torch.optim.AdamW(trained, lr=1e-3)  # a restart forgets all moments
        for weight in trained:
            weight.grad = None
        outputs = once(model, task)
        if trained:
            optimizer.step()
    return outputs


@torch.no_grad()
def merge_and_restart(model: nn.Module) -> None:
    """Add every adapter to its weight, in place, and let it begin again."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.get_base_layer().weight.add_(layer.get_delta_weight("default"))
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            # Drawn in float32: the reference of a wider dtype gets the same numbers.
            a.copy_(torch.empty(a.shape, device=a.device).uniform_(-1, 1) / math.sqrt(a.shape[1]))
            b.zero_()


def _of_model(cut: Cut, what: str) -> str:
    return f"{cut.kind}, {cut.about}, rank {cut.rank}, float32; {what}"


METHODS: dict[str, Method] = {
    "siamese encoder": Method(
        lambda _: _of_model(
            ENCODER, "one encoder on two inputs, contrastive loss of the rows' cosines"
        ),
        siamese,
    ),
    "ReLoRA": Method(
        lambda _: _of_model(
            LLAMA,
            f"a step is a cycle of {STEPS} training steps with AdamW, which keeps the sum of what "
            "they keep, and one merge and restart",
        ),
        relora,
    ),
    **{
        name: Method(partial(optimizers.about, what), make, is_model=False)
        for name, (what, make) in optimizers.STEPS.items()
    },
}
