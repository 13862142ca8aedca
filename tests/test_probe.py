"""Probes: new nodes that compute something else are found, whatever the reader thinks of them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import runlora_fx
from runlora_fx.passes.emit.copies import roots
from runlora_fx.passes.emit.proof.probe import probe
from runlora_fx.passes.emit.proof.verify import VerificationError
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.read.analysis import Analysis

aten = torch.ops.aten


def _two(fn: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> bool:
    """Probe the two results of a function."""
    sizes = ((24, 8), (8, 8), (2, 8), (8, 2))
    inputs = [torch.randn(size, dtype=dtype) for size in sizes]
    gm = make_fx(fn, tracing_mode="fake")(*inputs)
    old, new = gm.graph.output_node().args[0]  # type: ignore[union-attr, misc]
    state = torch.get_rng_state()
    done = probe(Analysis(gm.graph, ATEN), old, new, [])  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    return done


def _split(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x @ w.t() + 2 * (x @ a.t() @ b.t())


SAME: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "merged": lambda x, w, a, b: (_split(x, w, a, b), x @ torch.addmm(w, b, a, alpha=2).t()),
    "cast twice": lambda x, w, a, b: (
        x.to(torch.float64) @ w.to(torch.float64),
        x.to(torch.float64) @ w.to(torch.float64),
    ),
    "equal calls of what is not run": lambda x, w, a, b: (x.cumsum(0) @ w, x.cumsum(0) @ w),
}
OTHER: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "coefficient": lambda x, w, a, b: (_split(x, w, a, b), x @ torch.addmm(w, b, a, alpha=3).t()),
    "transposed": lambda x, w, a, b: (x @ w, x @ w.t()),
    "lost addend": lambda x, w, a, b: (_split(x, w, a, b), x @ w.t()),
    "two draws": lambda x, w, a, b: (torch.rand_like(x) @ w, torch.rand_like(x) @ w),
    "two masks": lambda x, w, a, b: (
        (torch.rand_like(x).gt(0.5) * x) @ w,
        (torch.rand_like(x).gt(0.5) * x) @ w,
    ),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("case", SAME)
def test_equal_results_pass(case: str, dtype: torch.dtype) -> None:
    assert _two(SAME[case], dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("case", OTHER)
def test_other_results_are_found(case: str, dtype: torch.dtype) -> None:
    with pytest.raises(VerificationError, match="on random numbers"):
        _two(OTHER[case], dtype)


def test_what_is_too_large_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ x, x @ x.t()

    gm = make_fx(fn, tracing_mode="fake")(torch.empty(4096, 4096))
    old, new = gm.graph.output_node().args[0]  # type: ignore[union-attr, misc]
    with caplog.at_level("INFO", logger="runlora_fx"):
        assert not probe(Analysis(gm.graph, ATEN), old, new, [])  # type: ignore[arg-type]
    assert "did not probe mm: it takes more than" in caplog.text


@pytest.mark.parametrize("strict", (True, False))
def test_strict_probes_what_the_verifier_believes(
    strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verifier is patched to believe anything, and the emitter to lose a factor of two."""
    sizes = ((96, 16), (16, 16), (2, 16), (16, 2))
    inputs = [torch.randn(size) for size in sizes]
    gm = fx.symbolic_trace(_split)
    emit = roots.Emitter.emit

    def halved(self: roots.Emitter, root: roots.Root) -> roots.Emitted:
        new = emit(self, root)
        return replace(new, node=self._scope.writer.scale(new.node, 0.5))

    monkeypatch.setattr(roots.Emitter, "emit", halved)
    monkeypatch.setattr(roots, "verify", lambda *_: None)
    if strict:
        with pytest.raises(VerificationError, match="on random numbers"):
            runlora_fx.rewrite(gm, inputs, strict=True)
    else:
        runlora_fx.rewrite(gm, inputs)
