"""What a program computes, by name, and whether two runs of it agree.

values_of(run, model, inputs) -> {"output 0": ..., "gradient of self.p0": ..., "input 1": ...}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

#: Error that reassociation in double precision may leave, of a tensor's norm or absolute.
_TOLERANCE = 1e-8

#: How much worse than eager the narrower dtypes may be, and what is always allowed.
_WORSE, _LOSSY = 6.0, 0.02


class DifferentError(Exception):
    """Two runs computed different things.

    Attributes:
        kind: ``"mismatch"`` or ``"strides"``.
        name: Of the value.
    """

    def __init__(self, kind: str, name: str, text: str) -> None:
        """Say which value differs, and how."""
        super().__init__(f"{name}: {text}")
        self.kind = kind
        self.name = name


def values_of(
    run: Callable[..., Any], model: nn.Module, inputs: list[Any], *, with_grads: bool = True
) -> dict[str, Tensor]:
    """Outputs, gradients, and what the run changed: inputs and buffers.

    The gradients are those of the sum of all outputs times fixed random numbers.
    """
    sources = {f"input {i}": x for i, x in enumerate(inputs)} | dict(model.named_parameters())
    sources = {name: x for name, x in sources.items() if x.requires_grad}
    torch.manual_seed(0)
    outputs = [y for y in tree_leaves(run(model, inputs)) if isinstance(y, Tensor)]
    values = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    heads = [y for y in outputs if y.requires_grad]
    if with_grads and heads:
        generator = torch.Generator().manual_seed(1)
        by = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in heads]
        grads = torch.autograd.grad(heads, list(sources.values()), by, allow_unused=True)
        for (name, x), grad in zip(sources.items(), grads, strict=True):
            values[f"gradient of {name}"] = torch.zeros_like(x) if grad is None else grad
    values |= {f"input {i}": x.detach() for i, x in enumerate(inputs)}
    values |= dict(model.named_buffers())
    return values


def compare(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    exact: Mapping[str, Tensor] | None = None,
    *,
    strides: bool = True,
) -> None:
    """Require the same values.

    Args:
        found: What is judged.
        wanted: What eager computes.
        exact: Where narrower dtypes are used, the same in double precision: then no value may be
            much further from it than eager's.
        strides: Whether the outputs have to lie in memory alike.

    Raises:
        DifferentError: If a value differs in its shape, its dtype, its strides or its numbers.
    """
    if found.keys() != wanted.keys():
        text = f"{sorted(found)} for {sorted(wanted)}"
        raise DifferentError("mismatch", "the values", text)
    for name, want in wanted.items():
        have = found[name]
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            text = f"{have.dtype} {tuple(have.shape)} for {want.dtype} {tuple(want.shape)}"
            raise DifferentError("mismatch", name, text)
        true = want if exact is None else exact[name]
        error = _distance(have, true)
        allowed = _TOLERANCE if exact is None else _WORSE * _distance(want, true) + _LOSSY
        if not error <= allowed:
            raise DifferentError("mismatch", name, f"relative error {error:.3g}")
    for name, want in wanted.items() if strides else ():
        if name.startswith("output") and strides_of(found[name]) != strides_of(want):
            text = f"strides {found[name].stride()} for {want.stride()} of {tuple(want.shape)}"
            raise DifferentError("strides", name, text)


def _distance(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| over ||wanted||, or absolute where that is small; infinite for NaN."""
    a, b = found.double(), wanted.double()
    distance = float((a - b).norm() / b.norm().clamp(min=1.0)) if a.numel() else 0.0
    return distance if distance == distance else float("inf")


def strides_of(x: Tensor) -> tuple[int, ...]:
    """The strides of the dimensions that matter; at the hints, where they are symbols."""
    pairs = zip(x.shape, x.stride(), strict=True)
    return tuple(int(stride) for size, stride in pairs if size > 1) if x.numel() else ()
