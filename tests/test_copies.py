"""Copies: an equal root is written as it would be step by step, and no other root is copied."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import runlora_fx
from runlora_fx.passes.emit.copies.roots import Copies

TOKENS, WIDTH, RANK = 48, 16, 2


class Layer(nn.Module):
    """A linear layer with a LoRA adapter, and an activation."""

    def __init__(self, rank: int = RANK, scaling: float = 2.0, *, bias: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.base.requires_grad_(False)
        self.a = nn.Linear(WIDTH, rank, bias=False)
        self.b = nn.Linear(rank, WIDTH, bias=False)
        self.scaling = scaling

    def linear(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.b(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x))


class Residual(Layer):
    """The same with a residual connection."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Scaled(Layer):
    """The same with a trained scale for every output, as DoRA and IA3 have."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x) * self.scale)


class Turned(Layer):
    """The same on an input that lies transposed in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.sin(x.T).T)


class Seen(Layer):
    """The same with another user of the activation between the two factors."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.a(x).sum()


class Transposing(Layer):
    """The same where the graph reads the transposed base weight elsewhere, in front."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ torch.tanh(self.base.weight.T))


class Stack(nn.Module):
    """Layers behind one another."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _shared() -> Stack:
    layers = [Layer() for _ in range(8)]
    layers[2].base = layers[0].base
    layers[3].a = layers[1].a
    return Stack(*layers)


def _twice() -> Stack:
    one = Layer()
    return Stack(one, Layer(), one, Layer())


#: Models, and whether some root in them is a copy.
MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "equal layers": (lambda: Stack(*(Layer() for _ in range(5))), True),
    "biases": (lambda: Stack(*(Layer(bias=True) for _ in range(5))), True),
    "residuals": (lambda: Stack(*(Residual() for _ in range(5))), True),
    "scales": (lambda: Stack(*(Scaled() for _ in range(5))), True),
    "transposed inputs": (lambda: Stack(*(Turned() for _ in range(5))), True),
    "another user": (lambda: Stack(Layer(), Layer(), Seen(), Layer(), Seen()), True),
    "weights that are transposed": (lambda: Stack(Layer(), Layer(), Transposing(), Layer()), True),
    "two kinds in turn": (lambda: Stack(Layer(), Turned(), Layer(), Turned()), True),
    "shared weights": (_shared, True),
    "a layer called twice": (_twice, True),
    "one scaling": (lambda: Stack(Layer(), Layer(), Layer(scaling=3.0), Layer()), True),
    "no two alike": (lambda: Stack(Layer(), Layer(rank=3), Layer(rank=4)), False),
}


@contextmanager
def _copies(*, allowed: bool) -> Iterator[list[str]]:
    """A context in which roots are copied or not, and the names of those that were."""
    copied, found = Copies.copied, list[str]()

    def counted(self: Copies, first: Any, root: Any, slots: Any) -> Any:
        new = copied(self, first, root, slots) if allowed else None
        if new is not None:
            found.append(root.node.name)
        return new

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Copies, "copied", counted)
        yield found


def _described(gm: fx.GraphModule) -> tuple[list[Any], list[list[str]]]:
    """All that later passes see of a graph, and which nodes share memory."""
    lines: list[Any] = []
    memory: dict[int, list[str]] = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        tensor = None
        if isinstance(value, Tensor):
            memory.setdefault(value.untyped_storage()._cdata, []).append(node.name)
            shape, strides = tuple(value.shape), value.stride()
            tensor = (shape, strides, value.storage_offset(), value.dtype, value.device)
        meta = {name: node.meta[name] for name in ("runlora", "recompute") if name in node.meta}
        lines.append((node.name, str(node.target), str(node.args), str(node.kwargs), tensor, meta))
        lines.append(sorted(node.meta))
    return lines, sorted(memory.values())


def _rewritten(
    model: nn.Module, *, allowed: bool, trains: bool, **options: Any
) -> tuple[tuple[list[Any], list[list[str]]], list[str]]:
    torch._dynamo.reset()
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    with _copies(allowed=allowed) as found, torch.set_grad_enabled(trains):
        gm = runlora_fx.joint_graph(model, [x], objective="flops", **options)
    return _described(gm), found


@pytest.mark.parametrize("trains", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", MODELS)
def test_copies_are_what_would_be_written_step_by_step(name: str, trains: bool) -> None:
    make, is_copied = MODELS[name]
    model = make().double()
    copied, found = _rewritten(model, allowed=True, trains=trains)
    written, _ = _rewritten(model, allowed=False, trains=trains)
    assert copied == written
    assert bool(found) == is_copied or not trains


def test_strict_probes_copied_roots() -> None:
    """A probe computes both sides of each root from random numbers, also of a copy."""
    model = Stack(*(Scaled() for _ in range(4))).double()
    _, found = _rewritten(model, allowed=True, trains=True, strict=True)
    assert found


def test_a_layer_of_another_layout_is_not_copied() -> None:
    """The strides of one input are all that tells the last layer from the others."""
    equal = Stack(*(Layer() for _ in range(4))).double()
    other = Stack(*(Layer() for _ in range(3)), Turned()).double()
    _, of_equal = _rewritten(equal, allowed=True, trains=False)
    _, of_other = _rewritten(other, allowed=True, trains=False)
    assert len(of_other) < len(of_equal)


def test_no_tensor_is_held_twice_in_memory() -> None:
    """Every tensor that is no view has memory of its own: partitioners tell them apart by it."""
    model = Stack(*(Layer() for _ in range(4))).double()
    (_, memory), found = _rewritten(model, allowed=True, trains=True)
    assert found
    products = [[name for name in group if name.startswith(("mm", "addmm"))] for group in memory]
    assert all(len(group) <= 1 for group in products)
