"""The layers that adapters come in, as lines of a random program.

    _lora(b) adds: v1 = F.linear(x0, self.p0); v2 = F.linear(x0, self.p1); ...

As in :mod:`tests.fuzz.operators`, each function draws its operands from a builder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from tests.fuzz.operators import Draw

if TYPE_CHECKING:
    from tests.fuzz.generate import Builder

LAYERS: list[Draw] = []

_Add = TypeVar("_Add", bound=Callable[..., Any])


def _layer(add: _Add) -> _Add:
    LAYERS.append(Draw(add))
    return add


def _is_input(x: Tensor) -> bool:
    return x.dim() in (2, 3) and x.dtype == torch.float64


def _rank(b: Builder) -> int:
    return b.sizes[b.rng.choice("rrq")]


@_layer
def _lora(b: Builder) -> str:
    x = b.pick(_is_input)
    n, r = b.shape(x)[-1], _rank(b)
    base = _linear_of(b, x)
    out = b.shape(base)[-1]
    inside = b.do(f"F.dropout({x}, 0.3, True)") if b.chance(0.25) else x
    down = b.do(f"F.linear({inside}, {b.like(r, n)})")
    up = b.do(f"F.linear({down}, {b.like(out, r)})")
    return b.do(f"{base} + {b.number()} * {up}" if b.chance(0.6) else f"{base} + {up}")


@_layer
def _merged(b: Builder) -> str:
    x = b.pick(_is_input)
    n, out, r = b.shape(x)[-1], b.size(), _rank(b)
    weight = b.do(f"{b.like(out, n)} + {b.number()} * ({b.like(out, r)} @ {b.like(r, n)})")
    return b.do(f"F.linear({x}, {weight})" if b.chance(0.6) else f"{x} @ {weight}.t()")


@_layer
def _dora(b: Builder) -> str:
    x = b.pick(_is_input)
    n, out, r = b.shape(x)[-1], b.size(), _rank(b)
    weight, down, up = b.like(out, n), b.like(r, n), b.like(out, r)
    norm = b.do(f"({weight} + 0.5 * ({up} @ {down})).norm(dim=1)" + ".detach()" * b.chance(0.5))
    gain = b.do(f"{b.like(out)} / (norm + 1)".replace("norm", norm))
    base = b.do(f"F.linear({x}, {weight})")
    lora = b.do(f"F.linear(F.linear({x}, {down}), {up}) * 0.5")
    if b.chance(0.5):
        return b.do(f"({base} + {lora}) * {gain}")
    return b.do(f"{base} + ({gain} - 1) * {base} + {gain} * {lora}")


@_layer
def _vera(b: Builder) -> str:
    x = b.pick(_is_input)
    n, r = b.shape(x)[-1], _rank(b)
    base = _linear_of(b, x)
    out = b.shape(base)[-1]
    down = b.do(f"{b.like(r)} * F.linear({x}, {b.like(r, n)})")
    return b.do(f"{base} + {b.like(out)} * F.linear({down}, {b.like(out, r)})")


@_layer
def _ia3(b: Builder) -> str:
    x = b.pick(_is_input)
    base = _linear_of(b, x)
    return b.do(f"{base} * {b.like(b.shape(base)[-1])}")


@_layer
def _hadamard(b: Builder) -> str:
    x = b.pick(_is_input)
    n, out, r = b.shape(x)[-1], b.size(), _rank(b)
    weight = b.like(out, n)
    update = b.do(f"{weight} * ({b.like(out, r)} @ {b.like(r, n)})")
    return b.do(f"F.linear({x}, {weight} + {update})")


@_layer
def _chain(b: Builder) -> str:
    x = b.pick(_is_input)
    n, r, q = b.shape(x)[-1], b.sizes["r"], b.sizes["q"]
    base = _linear_of(b, x)
    out = b.shape(base)[-1]
    chain = f"{x} @ {b.like(n, r)} @ {b.like(r, q)} @ {b.like(q, out)}"
    return b.do(f"{base} + {chain}")


@_layer
def _two_layers(b: Builder) -> None:
    hidden = b.do(f"F.gelu({_lora(b)})")
    n, r = b.shape(hidden)[-1], _rank(b)
    base = _linear_of(b, hidden)
    out = b.shape(base)[-1]
    b.do(f"{base} + ({hidden} @ {b.like(n, r)}) @ {b.like(r, out)}")


def _linear_of(b: Builder, x: str) -> str:
    """A linear layer of a value, as a function or as a module."""
    n, out = b.shape(x)[-1], b.size()
    if b.chance(0.3):
        made = f"nn.Linear({n}, {out}, bias={b.chance(0.5)}, dtype=torch.float64)"
        return b.do(f"{b.module(made)}({x})")
    bias = f", {b.like(out)}" if b.chance(0.4) else ""
    return b.do(f"F.linear({x}, {b.weight(out, n)}{bias})")
