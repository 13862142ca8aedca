"""The graphs that mistakes are made in: joint graphs and forwards in fp64, of square matrices.

    GRAPHS["plain LoRA"]() -> Came(graph, options, joins_in_place)

Operands of a square product may be swapped or transposed without an error of shapes, so that only
the proof stands between such a mistake and wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.parameter import Parameter

from runlora_fx.aot import copied
from runlora_fx.cost_model.devices.machine import Machine, key_of
from runlora_fx.cost_model.store import Record
from runlora_fx.options import Options

#: Tokens, inputs and outputs; and the rank.
SIZE, RANK = 12, 2


@dataclass(frozen=True)
class Came:
    """A graph as it comes to the pass.

    Attributes:
        module: The graph, with what it holds.
        options: The options of the pass.
        joins: True if what compiles the graph joins matrices without copies.
        machine: What plans are made for; None if it is what the options say.
    """

    module: fx.GraphModule
    options: Options
    joins: bool = False
    machine: Machine | None = None


class Layer(nn.Module):
    """A layer with random weights, by name; those that begin with "frozen" are not trained."""

    def __init__(self, compute: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.compute = compute
        for name, shape in shapes.items():
            weight = Parameter(torch.randn(shape, dtype=torch.float64))
            self.register_parameter(name, weight.requires_grad_(not name.startswith("frozen")))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.compute(self, *inputs)


_LORA = {"frozen": (SIZE, SIZE), "a": (RANK, SIZE), "b": (SIZE, RANK)}
_STACKS: dict[str, tuple[int, ...]] = {
    f"{name}_{part}": shape
    for part in "qkv"
    for name, shape in (("frozen", (128, 128)), ("a", (8, 128)), ("b", (128, 8)))
}


def _tokens(rows: int = SIZE, width: int = SIZE) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64).requires_grad_()


def _lora(w: Any, x: Tensor) -> Tensor:
    return F.linear(x, w.frozen) + 2.0 * F.linear(F.linear(x, w.a), w.b)


def _twice(w: Any, x: Tensor) -> Tensor:
    return _lora(w, torch.sin(_lora(w, x)))


def _two_kinds(w: Any, x: Tensor) -> Tensor:
    """Two regions that are not copies of each other."""
    hidden = torch.sin(_lora(w, x))
    return F.linear(hidden, w.other) + 3.0 * F.linear(F.linear(hidden, w.c), w.d)


def _dropout(w: Any, x: Tensor) -> Tensor:
    """Two adapters, of which the second sees an input with dropout."""
    first, second = (F.dropout(x, 0.3, True) for _ in range(2))
    return _lora(w, x) + F.linear(F.linear(first, w.c), w.d) + 0.5 * F.linear(second, w.base)


def _dora(w: Any, x: Tensor) -> Tensor:
    norm = (w.frozen + 2.0 * (w.b @ w.a)).norm(dim=1).detach()
    gain, base = w.magnitude / norm, F.linear(x, w.frozen)
    return base + (gain - 1) * base + gain * 2.0 * F.linear(F.linear(x, w.a), w.b)


def _vera(w: Any, x: Tensor) -> Tensor:
    return F.linear(x, w.frozen) + w.g * F.linear(w.d * F.linear(x, w.frozen_a), w.frozen_b)


def _two(w: Any, x: Tensor) -> Tensor:
    return _lora(w, x) + w.bias + 0.5 * F.linear(F.linear(x, w.c), w.d)


def _experts(w: Any, x: Tensor, k: Tensor) -> Tensor:
    weight = w.frozen + 2.0 * torch.bmm(w.b, w.a)
    return torch.bmm(weight[k], x.unsqueeze(-1)).squeeze(-1)


def _samples(w: Any, x: Tensor, k: Tensor) -> Tensor:
    return x @ w.frozen.mT + 2.0 * torch.bmm(torch.bmm(x, w.a[k].mT), w.b[k].mT)


def _attention(w: Any, x: Tensor) -> Tensor:
    def project(part: str) -> Tensor:
        frozen, a, b = (getattr(w, f"{name}_{part}") for name in ("frozen", "a", "b"))
        return F.linear(x, frozen) + 2.0 * F.linear(F.linear(x, a), b)

    mixed: Tensor = torch.sigmoid(project("q")) * torch.tanh(project("k")) * project("v")
    return mixed


def _activated(w: Any, x: Tensor) -> Tensor:
    """The backward of `low` recomputes the sine, and unpacks the mask."""
    dropped = F.dropout(torch.sin(x), 0.5, True)
    return torch.sin(F.linear(x, w.frozen) + 2.0 * F.linear(F.linear(dropped, w.a), w.b))


class _Quantised(nn.Module):
    """A base weight in four bits, as bitsandbytes has it."""

    def __init__(self) -> None:
        super().__init__()
        from bitsandbytes.nn import Linear4bit, Params4bit

        self.base = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
        self.base.weight = Params4bit(torch.randn(64, 64) / 8, requires_grad=False)
        self.a = Parameter(torch.randn(RANK, 64))
        self.b = Parameter(torch.randn(64, RANK))

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self.base(x)
        return base + 2.0 * F.linear(F.linear(x, self.a), self.b)


def _written_between(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A function that writes to its input between a result and the reader of the result."""
    y = x @ w.t() + 2.0 * (x @ a.t() @ b.t())
    x.add_(1.0)
    return torch.sin(y), x @ w


class _Seen(Exception):
    """Ends a compilation once the joint graph was seen."""


def joint(model: nn.Module, *inputs: Tensor, decomposed: bool = False) -> fx.GraphModule:
    """The joint graph of a model as it comes to the pass, by Inductor's decompositions or none."""
    table = select_decomp_table() if decomposed else None
    found: list[fx.GraphModule] = []

    def see(graph: fx.GraphModule, *_: Any, **__: Any) -> Any:
        found.append(copied(graph))
        raise _Seen

    def run(graph: fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=run, partition_fn=see, decompositions=table)
    compiled = torch.compile(model, backend=backend)
    try:
        compiled(*inputs)
    except BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, _Seen):
            raise
    return found[0]


def _of(
    compute: Callable[..., Tensor], *more: Tensor, x: Tensor | None = None, **shapes: Any
) -> Came:
    torch.manual_seed(0)
    inputs = (_tokens() if x is None else x, *more)
    return Came(joint(Layer(compute, **shapes), *inputs), Options(objective="flops"))


def _stacks() -> Came:
    torch.manual_seed(0)
    graph = joint(Layer(_attention, **_STACKS), _tokens(256, 128))
    return Came(graph, Options(device="h100"), joins=True)


def _bound_by_flops() -> Machine:
    """A machine on which random numbers take long, so that masks are saved as bits."""
    seconds = dict.fromkeys(("flops.nn", "flops.nt", "flops.tn"), 1e-12)
    seconds |= dict.fromkeys(("read", "written", "elementwise", "launches", "special"), 1e-25)
    machine, cpu = Machine(use_stored=False), torch.device("cpu")
    machine._records[key_of(cpu, "float64")] = Record({**seconds, "random": 1.0})
    return machine


def _low() -> Came:
    torch.manual_seed(0)
    shapes = {"frozen": (16, 16), "a": (RANK, 16), "b": (16, RANK)}
    graph = joint(Layer(_activated, **shapes), _tokens(16, 16), decomposed=True)
    return Came(graph, Options(memory="low"), machine=_bound_by_flops())


def _quantised() -> Came:
    torch.manual_seed(0)
    graph = joint(_Quantised().to("cpu"), torch.randn(96, 64).requires_grad_())
    return Came(graph, Options(objective="flops"))


def _by_sample() -> Came:
    picked = torch.tensor([0, 1] * 12)
    shapes = {"frozen": (128, 128), "a": (2, 8, 128), "b": (2, 128, 8)}
    x = torch.randn(24, 1, 128, dtype=torch.float64).requires_grad_()
    return replace(_of(_samples, picked, x=x, **shapes), options=Options(device="h100"))


def _by_expert() -> Came:
    picked = torch.tensor([0, 1] * (SIZE // 2))
    shapes = {"frozen": (2, SIZE, SIZE), "a": (2, RANK, SIZE), "b": (2, SIZE, RANK)}
    return _of(_experts, picked, **shapes)


def _in_place() -> Came:
    inputs = [torch.randn(size, dtype=torch.float64) for size in (2 * [(SIZE, SIZE)])]
    a, b = torch.randn(RANK, SIZE).double(), torch.randn(SIZE, RANK).double()
    graph = make_fx(_written_between, tracing_mode="fake")(*inputs, a, b)
    return Came(graph, Options(objective="flops"))


GRAPHS: dict[str, Callable[[], Came]] = {
    "plain LoRA": lambda: _of(_lora, **_LORA),
    "two calls of one layer": lambda: _of(_twice, **_LORA),
    "two kinds of layers": lambda: _of(
        _two_kinds, **_LORA, other=(SIZE, SIZE), c=(RANK, SIZE), d=(SIZE, RANK)
    ),
    "dropout": lambda: _of(_dropout, **_LORA, c=(SIZE, SIZE), d=(SIZE, SIZE), base=(SIZE, SIZE)),
    "DoRA": lambda: _of(_dora, **_LORA, magnitude=(SIZE,)),
    "VeRA": lambda: _of(
        _vera, frozen=(SIZE, SIZE), frozen_a=(RANK, SIZE), frozen_b=(SIZE, RANK), d=(2,), g=(SIZE,)
    ),
    "two adapters and a bias": lambda: _of(
        _two, **_LORA, c=(RANK, SIZE), d=(SIZE, RANK), bias=(SIZE,)
    ),
    "experts": _by_expert,
    "per sample": _by_sample,
    "stacks": _stacks,
    "recompute": _low,
    "in place": _in_place,
    **({"quantised": _quantised} if find_spec("bitsandbytes") else {}),
}
