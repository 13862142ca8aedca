"""Steps: what a contender is timed on.

    step = Step(Contender("inductor"), model, Task(...))
    step.values()       the output and all gradients
    step.seconds()      the time of one step

Invariant: all contenders of a task share its data, and its frozen weights if no step changes them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from measuring.turns import seconds

#: Puts the layers of another library in the place of PEFT's.
Convert = Callable[[nn.Module, "Task"], nn.Module]

#: Runs one step of a model on a task, and returns what it makes.
Run = Callable[[nn.Module, "Task"], list[Tensor]]


def once(model: nn.Module, task: Task) -> list[Tensor]:
    """A forward, and the backward of its first output if the task is training."""
    cast: Any = nullcontext()
    if task.autocast:
        cast = torch.autocast(task.device.type, torch.bfloat16)
    with cast, torch.set_grad_enabled(task.dy is not None):
        outputs: list[Tensor] = tree_leaves(model(*task.inputs))
    if task.dy is not None:
        outputs[0].backward(task.dy.to(outputs[0].dtype))
    return outputs


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
        run: What a step is.
        is_base_shared: Whether contenders share frozen weights; not if a step changes them.
    """

    adapted: nn.Module
    frozen: nn.Module
    inputs: tuple[Tensor, ...]
    dy: Tensor | None
    dropout: float = 0.0
    autocast: bool = False
    run: Run = once
    is_base_shared: bool = True

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.inputs[0].device

    def exact(self, dtype: torch.dtype) -> Task:
        """The same numbers in a wider dtype, without autocast."""
        return replace(
            self,
            adapted=widened(self.adapted, dtype),
            inputs=tuple(
                x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x
                for x in self.inputs
            ),
            dy=None if self.dy is None else self.dy.to(dtype),
            autocast=False,
        )


class Step:
    """A step of one contender: forward, and backward if the task is training."""

    def __init__(self, contender: Contender, task: Task) -> None:
        """Make the contender's model; the first step compiles it."""
        model = task.adapted if contender.is_adapted else task.frozen
        model = copy_of(model) if task.is_base_shared else copy.deepcopy(model)
        if contender.convert is not None:
            model = contender.convert(model, task)
        self.model, self.task, self.is_turned = model, task, contender.is_turned
        self.trained = [p for p in model.parameters() if p.requires_grad]
        if contender.backend is not None:
            options = dict(contender.options) or None
            model.compile(backend=contender.backend, dynamic=False, options=options)

    def __call__(self) -> list[Tensor]:
        """What a step makes; gradients are left on the adapters and on the input."""
        self.release()
        return [made.detach() for made in self.task.run(self.model, self.task)]

    def release(self) -> None:
        """Drop the gradients of the last step."""
        for tensor in (self.task.inputs[0], *self.trained):
            tensor.grad = None

    def values(self) -> list[Tensor]:
        """The outputs and all gradients in float64, at a fixed seed."""
        torch.manual_seed(1)
        outputs = self()
        turn = (lambda t: t.t()) if self.is_turned else (lambda t: t)
        trained = [turn(w.grad) for w in self.trained if w.grad is not None]
        given = self.task.inputs[0].grad
        found = [*outputs, *([] if given is None else [given]), *trained]
        return [t.detach().double() for t in found]

    def seconds(self) -> float:
        """The time of one step [s]."""
        return seconds(self, self.task.device)


def copy_of(model: nn.Module) -> nn.Module:
    """A model with adapters of its own; frozen weights are shared."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    made: nn.Module = copy.deepcopy(model, shared)
    return made


def widened(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy that computes with the same numbers in a wider dtype."""
    made: Any = copy.deepcopy(model).to(dtype)
    for module in made.modules():
        if hasattr(module, "compute_dtype"):  # a 4-bit layer of bitsandbytes
            module.compute_dtype = module.weight.quant_state.dtype = dtype
    return made  # type: ignore[no-any-return]


def error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative error of the tensors."""
    return max(
        float((a - b).norm() / b.norm().clamp_min(1e-30))
        for a, b in zip(found, wanted, strict=True)
    )


#: What transformers' classes leave without values: the weights of experts and of their router.
UNSET = ("gate_up_proj", "down_proj", "mlp.gate.weight")


def randomise(model: nn.Module) -> None:
    """Give values to experts and to B: PEFT starts with zeros, whose gradients say little."""
    for name, weight in model.named_parameters():
        if "lora_B" in name or name.endswith(UNSET):
            nn.init.normal_(weight, std=0.02)
