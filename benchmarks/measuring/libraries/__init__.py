"""Other libraries' LoRA layers, put in the place of PEFT's with the same numbers.

Each module has ``NEEDS``, what must be importable, and ``layer``, which makes one layer. None of
their code is here: each is used as the user's machine has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from measuring.steps import Contender, Task


@dataclass(frozen=True)
class Adapted:
    """One adapted linear layer of PEFT's.

    Attributes:
        base: The frozen layer, weight (out, in).
        a: Weight of the adapter's first product (rank, in).
        b: Weight of its second product (out, rank).
        alpha: Its scaling times the rank.
        dropout: Of its input.
        inputs: Sizes of the layer's input, but for the last.
    """

    base: nn.Linear
    a: Tensor
    b: Tensor
    alpha: float
    dropout: float
    inputs: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Columns of the adapter's first product."""
        return self.a.shape[0]


Make = Callable[[Adapted], nn.Module]


def contender(
    module: Any, backend: str | None, options: dict[str, Any] | None = None
) -> Contender | str:
    """A contender that uses a library's layers, or why there is none."""
    if find_spec(module.NEEDS) is None:
        return f"{module.NEEDS} is not installed"
    return Contender(
        backend,
        options or {},
        convert=partial(replaced, make=module.layer),
        is_turned=getattr(module, "IS_TURNED", False),
    )


def replaced(model: nn.Module, task: Task, make: Make) -> nn.Module:
    """A model whose PEFT layers are another library's.

    Raises:
        ValueError: If a layer has no such counterpart.
    """
    rows = tuple(task.inputs[0].shape[:-1])
    return each_replaced(model, partial(made, rows=rows, make=make))


def each_replaced(model: nn.Module, by: Callable[[Any], nn.Module]) -> nn.Module:
    """A model whose PEFT layers are what is made of them."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "lora_A"):
                setattr(module, name, by(child))
    return model


def made(layer: Any, rows: tuple[int, ...], make: Make) -> nn.Module:
    """The counterpart of one layer, with its numbers and in its mode."""
    if layer.use_dora.get("default"):
        raise ValueError("DoRA has no counterpart")
    dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    alpha = layer.scaling["default"] * layer.r["default"]
    found = make(Adapted(layer.base_layer, a.detach(), b.detach(), alpha, dropout, rows))
    for name, weight in found.named_parameters():
        weight.requires_grad_("lora_" in name)
    found.train(layer.training)  # loralib's returns nothing
    return found
