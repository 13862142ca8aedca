"""Steps: what a contender is timed on.

    step = Step(Contender("inductor"), model, Task(...))
    step.values()       the output and all gradients
    step.seconds()      the time of one step

Invariant: all contenders of a task share its data and its frozen weights.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from runlora_fx.cost_model.devices.registry import entry_of

#: Puts the layers of another library in the place of PEFT's.
Convert = Callable[[nn.Module, "Task"], nn.Module]


@dataclass(frozen=True)
class Contender:
    """One way to run a task.

    Attributes:
        backend: Of ``torch.compile``; None is eager mode.
        options: Of the backend.
        is_adapted: Whether the model has adapters.
        convert: Makes the model another library's.
        is_turned: Whether that library stores its adapters transposed.
    """

    backend: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    is_adapted: bool = True
    convert: Convert | None = None
    is_turned: bool = False


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Attributes:
        adapted: The model with PEFT's adapters.
        frozen: The same model without them.
        inputs: What both are called with; the first is the input that has a gradient.
        dy: The gradient of the output; None if the task is inference.
        dropout: Of the adapters' inputs.
        autocast: Whether a step runs under autocast to bfloat16.
    """

    adapted: nn.Module
    frozen: nn.Module
    inputs: tuple[Tensor, ...]
    dy: Tensor | None
    dropout: float = 0.0
    autocast: bool = False

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.inputs[0].device

    def exact(self, dtype: torch.dtype) -> Task:
        """The same numbers in a wider dtype, without autocast."""
        x, *others = self.inputs
        wide = x.detach().to(dtype).requires_grad_(x.requires_grad)
        return replace(
            self,
            adapted=copy.deepcopy(self.adapted).to(dtype),
            inputs=(wide, *others),
            dy=None if self.dy is None else self.dy.to(dtype),
            autocast=False,
        )


class Step:
    """A step of one contender: forward, and backward if the task is training."""

    def __init__(self, contender: Contender, task: Task) -> None:
        """Make the contender's model; the first step compiles it."""
        model = copy_of(task.adapted if contender.is_adapted else task.frozen)
        if contender.convert is not None:
            model = contender.convert(model, task)
        self.model, self.task, self.is_turned = model, task, contender.is_turned
        self.trained = [p for p in model.parameters() if p.requires_grad]
        if contender.backend is not None:
            options = dict(contender.options) or None
            model.compile(backend=contender.backend, dynamic=False, options=options)

    def __call__(self) -> Tensor:
        """The output; gradients are left on the adapters and on the input."""
        self.release()
        task = self.task
        cast: Any = nullcontext()
        if task.autocast:
            cast = torch.autocast(task.device.type, torch.bfloat16)
        with cast, torch.set_grad_enabled(task.dy is not None):
            y: Tensor = self.model(*task.inputs)
        if task.dy is not None:
            y.backward(task.dy.to(y.dtype))
        return y.detach()

    def release(self) -> None:
        """Drop the gradients of the last step."""
        for tensor in (self.task.inputs[0], *self.trained):
            tensor.grad = None

    def values(self) -> list[Tensor]:
        """The output and all gradients in float64, at a fixed seed."""
        torch.manual_seed(1)
        y = self()
        turn = (lambda t: t.t()) if self.is_turned else (lambda t: t)
        trained = [turn(w.grad) for w in self.trained if w.grad is not None]
        given = self.task.inputs[0].grad
        found = [y, *([] if given is None else [given]), *trained]
        return [t.detach().double() for t in found]

    def seconds(self) -> float:
        """The time of one step [s]."""
        synchronise, device = entry_of(self.task.device).synchronise, self.task.device
        synchronise(device)
        start = time.perf_counter()
        self()
        synchronise(device)
        return time.perf_counter() - start


def copy_of(model: nn.Module) -> nn.Module:
    """A model with adapters of its own; frozen weights are shared."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    made: nn.Module = copy.deepcopy(model, shared)
    return made


def error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative error of the tensors."""
    return max(
        float((a - b).norm() / b.norm().clamp_min(1e-30))
        for a, b in zip(found, wanted, strict=True)
    )


def randomise(model: nn.Module) -> None:
    """Give B values: PEFT starts with zeros, whose gradients say little."""
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.02)
