"""Self-test: a tiny LoRA layer is compiled, and must be rewritten and compute the same.

Before -> after: ``X W' + 2 (X A') B'`` -> ``X (W + 2 B A)'``, and equal results.

Invariant: the caches of torch are neither read nor written, so that the graph is really planned.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from runlora_fx._torch_debug import compiler_says, lacks_compiler
from runlora_fx.cli.console import quietly
from runlora_fx.cli.doctor.finding import Finding
from runlora_fx.history import report_of

#: So many tokens that merging saves FLOPs: more than in * out / (in + out).
_TOKENS, _WIDTH, _RANK = 256, 64, 4

_REPORT = "please report this, with the output of --json"

#: The relative difference that rounding in fp32 may make.
_TOLERANCE = 1e-4


class _Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"w": (_WIDTH, _WIDTH), "a": (_RANK, _WIDTH), "b": (_WIDTH, _RANK)}
        for name, shape in shapes.items():
            drawn = torch.randn(shape, generator=generator) / 8
            self.register_parameter(name, nn.Parameter(drawn, requires_grad=name != "w"))
        self.x = torch.randn(_TOKENS, _WIDTH, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        w, a, b = self.get_parameter("w"), self.get_parameter("a"), self.get_parameter("b")
        return x @ w.t() + 2 * (x @ a.t() @ b.t())


def check(backend: str) -> Iterator[Finding]:
    """Compile a layer with a backend, and compare results and gradients with eager mode."""
    started = time.monotonic()
    name, remedy = f"backend={backend!r}", _REPORT
    layer, reference = _Lora(), _Lora()
    torch.compiler.reset()  # code that was compiled before is not planned again
    try:
        with _without_caches(), quietly():
            compiled = torch.compile(
                layer, backend=backend, dynamic=False, options={"runlora.objective": "flops"}
            )
            made, wanted = compiled(layer.x), reference(reference.x)
            made.square().sum().backward()
            wanted.square().sum().backward()
    except Exception as error:
        yield Finding("self-test", name, "problem", *_failure(error))
        return
    pairs = [(made, wanted), *((p.grad, q.grad) for p, q in _trained(layer, reference))]
    report = report_of(compiled)
    if not all(_are_equal(one, other) for one, other in pairs):
        yield Finding("self-test", name, "problem", "results differ from eager mode", remedy)
    elif report is None or not any(site.changed for site in report):
        yield Finding("self-test", name, "problem", "the layer was not rewritten", remedy)
    else:
        took = time.monotonic() - started
        text = f"a LoRA layer was rewritten; results equal eager mode ({took:.1f} s)"
        yield Finding("self-test", name, "ok", text)


def _failure(error: Exception) -> tuple[str, str]:
    """Why the layer could not be compiled, and what to do."""
    said = compiler_says(error)
    if said is not None:
        return f"the C++ compiler fails: {said}", "repair it, or name another one in CXX"
    if lacks_compiler(error) or lacks_compiler(error.__cause__ or error):
        return "there is no C++ compiler that works", "install one, as said above"
    return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", _REPORT


@contextmanager
def _without_caches() -> Iterator[None]:
    """A context in which torch uses no cache, and does not warn of that."""
    before = torch.compiler.config.force_disable_caches
    torch.compiler.config.force_disable_caches = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
            yield
    finally:
        torch.compiler.config.force_disable_caches = before


def _trained(one: nn.Module, other: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return ((p, q) for p, q in pairs if p.requires_grad)


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return bool((one - other).norm() <= _TOLERANCE * other.norm())
