"""Times of the fused kernels (`runlora_fx.kernels`) against torch's operators, on random data.

For the layer shapes of Llama-3-8B, rank 16, in bfloat16. Kernel and plain operators are called in
turn, in rows of calls that are timed together. A kernel that errs by more than twice what the plain
operators err against float32 is refused: its times are not returned.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from measuring.turns import Ratio, seconds, take_turns
from torch import Tensor

#: Outputs and inputs of the layers; tokens; rank.
LAYERS = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
TOKENS, RANK = 8192, 16

CALLS, ROUNDS, SLACK = 10, 15, 0.01


@dataclass(frozen=True)
class Rival:
    """A kernel, the operators that it replaces, and their operands."""

    kernel: str
    fused: Callable[..., Any]
    plain: Callable[..., Any]
    operands: tuple[Tensor, ...]


def rivals(kernels: Any, outputs: int, inputs: int, tokens: int, x: Callable[..., Tensor]) -> Any:
    """The kernels for one layer; ``x`` makes a random matrix."""
    w, b, a = x(outputs, inputs), x(outputs, RANK), x(RANK, inputs)
    dy, s, xs = x(tokens, outputs), x(tokens, RANK), x(tokens, inputs)
    yield Rival("merge", kernels.merge, lambda w, b, a: torch.addmm(w, b, a), (w, b, a))
    yield Rival(
        "gradient_products",
        kernels.gradient_products,
        lambda dy, b, s: (dy @ b, dy.t() @ s),
        (dy, b, s),
    )
    yield Rival(
        "two_products",
        kernels.two_products,
        lambda x, w, s, b: torch.addmm(x @ w.t(), s, b.t()),
        (xs, w, s, b),
    )


def measured(device: torch.device, scale: int, end: float) -> Iterator[dict[str, Any]]:
    """A row for each kernel and layer; nothing where there are no kernels.

    Args:
        device: Where they run.
        scale: What sizes are divided by.
        end: When to start no other, as ``time.monotonic``.
    """
    try:
        kernels = importlib.import_module("runlora_fx.kernels")
    except ImportError:
        return
    if not hasattr(kernels, "merge"):  # without Triton
        return
    generator = torch.Generator(device).manual_seed(0)

    def matrix(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator, device=device)
        return (made / shape[-1] ** 0.5).to(torch.bfloat16)

    for outputs, inputs in LAYERS:
        o, i, n = (max(RANK, size // scale) for size in (outputs, inputs, TOKENS))
        for rival in rivals(kernels, o, i, n, matrix):
            shape = f"{n} x {i} -> {o}, r {RANK}"
            if time.monotonic() < end:
                yield {"kernel": rival.kernel, "shape": shape, **compared(rival, device)}


def compared(rival: Rival, device: torch.device) -> dict[str, Any]:
    """The times of one kernel and of the plain operators [s], or why there are none."""
    try:
        exact = _tuple(rival.plain(*(t.float() for t in rival.operands)))
        allowed = 2 * _error(_tuple(rival.plain(*rival.operands)), exact) + SLACK
        wrong = _error(_tuple(rival.fused(*rival.operands)), exact)
    except Exception as failed:  # a compiler raises what it likes; the others still run
        return {"refused": f"{type(failed).__name__}: {failed}"}
    if not wrong <= allowed:
        return {"refused": f"relative error {wrong:.3g}, allowed {allowed:.3g}"}
    calls = {"kernel": rival.fused, "plain": rival.plain}
    steps = {
        name: partial(seconds, partial(call, *rival.operands), device, CALLS)
        for name, call in calls.items()
    }
    times = take_turns(steps, ROUNDS)
    return {
        "kernel_s": median(times["kernel"]),
        "plain_s": median(times["plain"]),
        "ratio": asdict(Ratio.of(times["kernel"], times["plain"])),
        "error": wrong,
    }


def _tuple(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def _error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The largest relative error."""
    pairs = zip(found, exact, strict=True)
    return max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)
