"""Steps of optimizers that multiply low-rank chains, in the order that papers write them.

The functions come from `examples/flavours`.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

sys.path.append(str(Path(__file__).parent.parent / "examples" / "flavours"))

import flora
import lora_pro

M, N, R, TOKENS, SCALING = 48, 32, 4, 64, 2.0
# Equal for two orders of the same sums in double precision.
RTOL = 1e-12


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Step:
    """A step of an optimizer.

    Attributes:
        source: Where it comes from.
        run: The function.
        inputs: Its arguments.
        flops: FLOPs of its matrix products in the cheapest order [FLOP].
        avoided: The shape of a product that the written order makes and this order does not.
    """

    source: str
    run: Callable[..., Any]
    inputs: Sequence[Any]
    flops: int
    avoided: tuple[int, int]


def flora_inputs() -> list[Any]:
    weights = {"up": random(M, N), "up_bias": random(M), "down": random(N, M)}
    kept = {"up": random(M, R), "down": random(N, R, seed=1)}
    projections = {"up": random(R, N), "down": random(R, M)}
    return [weights, kept, projections, random(TOKENS, N), random(TOKENS, N, seed=1)]


_ADAPTER = [random(R, N), random(M, R), random(R, N, seed=1), random(M, R, seed=1), SCALING]
# A A' and B'B; (B'B)^-1 gA; gB (A A')^-1; B times the rest: (B'B)^-1 (B' .).
_CORRECTED = 2 * (R * R * (N + M) + R * R * N + 3 * M * R * R + R**3)
# What theorem 2.3 adds: gA A', (B'B)^-1 of it; four rotations; X A and B X.
_SYLVESTER = 2 * (R * R * N + R**3 + 4 * R**3 + R * R * (N + M))

STEPS = {
    "LoRA-Pro": Step(
        "examples/flavours/lora_pro.py; arXiv 2407.18242, theorem 2.1",
        lora_pro.corrected,
        _ADAPTER,
        _CORRECTED,
        (M, M),
    ),
    "LoRA-Pro, Sylvester": Step(
        "examples/flavours/lora_pro.py; arXiv 2407.18242, theorem 2.3",
        lora_pro.corrected_by_sylvester,
        _ADAPTER,
        _CORRECTED + _SYLVESTER,
        (M, M),
    ),
    "Flora, resampling": Step(
        "examples/flavours/flora.py; arXiv 2402.03293, algorithm 2",
        flora.resample,
        [random(M, R), random(R, N), random(R, N, seed=1)],
        2 * (R * R * N + M * R * R),
        (M, N),
    ),
    "Flora, accumulation": Step(
        "examples/flavours/flora.py; arXiv 2402.03293, algorithm 1, with forward and backward",
        flora.accumulate,
        flora_inputs(),
        # Two layers forward, the inner gradient, and dY' (X P') for both.
        2 * TOKENS * (2 * M * N + N * M + 2 * R * (M + N)),
        (M, N),
    ),
}


def traced(step: Step) -> tuple[fx.GraphModule, list[Tensor]]:
    """The step as a graph of ATen operators over its tensors."""
    flat, spec = tree_flatten(list(step.inputs))
    at = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]

    def run(*tensors: Tensor) -> Any:
        arguments = list(flat)
        for i, tensor in zip(at, tensors, strict=True):
            arguments[i] = tensor
        return step.run(*tree_unflatten(arguments, spec))

    inputs = [flat[i] for i in at]
    return make_fx(run)(*inputs), inputs
