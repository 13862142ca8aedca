"""Dropout masks that are saved as bits: the same numbers, an eighth of the bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from checks import (
    INDUCTOR,
    RUNLORA,
    activation,
    assert_gradient_is_the_slope,
    assert_same_values,
    compiled,
    outputs_and_grads,
    saved_bytes,
)
from conftest import FLOPS_BOUND
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices.machine import DTYPES, key_of
from runlora_fx.cost_model.store import Record
from runlora_fx.passes.emit.graph.packed_masks import MaskPacker, packed_dim
from runlora_fx.passes.emit.graph.transaction import transaction

CAST = torch.ops.prims.convert_element_type.default
RANK = 1


@pytest.fixture(autouse=True)
def random_numbers_take_long(no_profile: Path) -> None:
    """So no mask is drawn again, and ``low`` packs whatever it can."""
    for dtype in DTYPES:
        store.add(key_of(torch.device("cpu"), dtype), Record({**FLOPS_BOUND, "random": 1.0}))


class Layer(nn.Module):
    """A linear layer with an adapter that sees dropped-out inputs."""

    def __init__(self, width: int, p: float, bends: bool) -> None:
        super().__init__()
        self.base = nn.Linear(width, width, bias=False).requires_grad_(False)
        self.a = nn.Linear(width, RANK, bias=False)
        self.b = nn.Linear(RANK, width, bias=False)
        self.p, self.bends = p, bends

    def forward(self, x: Tensor) -> Tensor:
        dropped = nn.functional.dropout(x, self.p)
        dropped = dropped.cos() if self.bends else dropped
        made: Tensor = self.base(x) + 2 * self.b(self.a(dropped))
        return made.sin()


def layers(width: int, p: float = 0.5, bends: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Layer(width, p, bends), Layer(width, p, bends))


def seeded(run: Any, x: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients, with random numbers that compiling has no part in."""
    run(x)
    torch.manual_seed(7)
    return outputs_and_grads(run, [x])


def kept(model: nn.Module, x: Tensor, backend: str, **policy: object) -> int:
    run = compiled(model, backend, **policy)
    run(x)
    return saved_bytes(lambda: run(x), [*model.parameters(), x])


@pytest.mark.parametrize(
    ("shape", "dim"),
    (
        ((32,), 0),
        ((5, 16), 1),
        ((16, 5), 0),
        ((8, 24), 1),
        ((2, 24, 3), 1),
        ((2, 3, 4, 8), 3),
        ((1, 8, 1), 1),
    ),
)
def test_what_is_unpacked_is_the_mask(shape: tuple[int, ...], dim: int) -> None:
    def joint(x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        mask = x > 0
        return x * mask, tangent * mask

    graph = fx.Graph()
    x, tangent = (graph.placeholder(name) for name in ("x", "tangents_1"))
    mask = graph.call_function(torch.ops.aten.gt.Scalar, (x, 0))
    forward, backward = (
        graph.call_function(torch.ops.aten.mul.Tensor, (n, mask)) for n in (x, tangent)
    )
    graph.output((forward, backward))
    gm = fx.GraphModule({}, graph)
    for node in (x, tangent, forward, backward):
        node.meta["val"] = torch.empty(shape)
    mask.meta["val"] = torch.empty(shape, dtype=torch.bool)
    assert packed_dim(mask) == dim
    with transaction(graph):
        assert not MaskPacker(graph, lambda node: node is backward).pack([mask], [])
    gm.recompile()
    given = torch.randn(shape), torch.randn(shape)
    for found, wanted in zip(gm(*given), joint(*given), strict=True):
        assert torch.equal(found, wanted)
    saved = [n.meta["val"] for n in graph.nodes if n.meta.get("recompute") and n.target is CAST]
    (bits,) = [val for val in saved if val.dtype is torch.uint8]
    assert bits.numel() * 8 == given[0].numel()


@pytest.mark.parametrize(
    "val",
    (
        torch.empty(7, 9, dtype=torch.bool),
        torch.empty(8, 0, dtype=torch.bool),
        torch.empty((), dtype=torch.bool),
        torch.empty(16, 8, dtype=torch.bool).t(),
        torch.empty(8, 8),
    ),
    ids=("odd", "empty", "scalar", "turned", "floats"),
)
def test_what_cannot_be_packed(val: Tensor) -> None:
    node = fx.Graph().placeholder("mask")
    node.meta["val"] = val
    assert packed_dim(node) is None


@pytest.mark.parametrize("bends", (False, True), ids=("plain", "read behind"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("width", (64, 40, 36), ids=("vectors", "remainders", "rows"))
def test_gradients_are_those_of_inductor(width: int, dtype: torch.dtype, bends: bool) -> None:
    """8 does not divide 36, but it divides the number of rows."""
    model, x = layers(width, bends=bends).to(dtype), activation(24, width).detach().to(dtype)
    x.requires_grad_()
    wanted = seeded(compiled(model, INDUCTOR), x)
    run = compiled(model, RUNLORA, memory="low", strict=True)
    assert_same_values(seeded(run, x), wanted, 1e-5 if dtype is torch.float32 else 3e-2)


@pytest.mark.parametrize(("rows", "bits"), ((24, 1), (21, 8)), ids=("packed", "bytes"))
def test_a_mask_takes_a_bit_for_an_element(rows: int, bits: int) -> None:
    x = activation(rows, 36)
    sums = 2 * rows * 36 * 4  # what each sine is computed of
    found = kept(layers(36), x, RUNLORA, memory="low")
    assert found == sums + 2 * rows * 36 * bits // 8


@pytest.mark.parametrize(
    ("budget", "checkpointed"), ((1.0, False), (0.5, False), (1.0, True), (0.5, True)), ids=str
)
def test_the_backward_reads_the_mask_of_the_forward(budget: float, checkpointed: bool) -> None:
    model, x = layers(64), activation(24, 64)

    def called(x: Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)

    with functorch_config.patch(activation_memory_budget=budget):
        run = compiled(called, RUNLORA, memory="low")  # type: ignore[arg-type]
        assert_gradient_is_the_slope(run, x)
