"""The recipes of `docs/contributing.md`, followed as they stand there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from runlora_fx.cost_model.ops import Elementwise, MatMul
from runlora_fx.options import Options
from runlora_fx.passes.algebra.addends import Addends, scaled
from runlora_fx.passes.algebra.implementations import (
    REGISTERED,
    Implementation,
    register,
)
from runlora_fx.passes.algebra.polynomials import Scalar
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Product, Step
from runlora_fx.passes.algebra.work import Work
from runlora_fx.passes.emit.proof.verify import VerificationError
from runlora_fx.passes.emit.steps.registry import Emission, writes, writing
from runlora_fx.passes.levels import readers
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.levels.cuts import Cut
from runlora_fx.passes.levels.forms import Form, LinearNodes, Reading
from runlora_fx.passes.levels.level import Dialect, Reader
from runlora_fx.passes.levels.sizes import Shape
from runlora_fx.passes.pipeline import rewrite_graph
from runlora_fx.passes.read.example_values import annotate
from runlora_fx.passes.search.ways import Ways
from runlora_fx.report.data import Report

TOKENS, INPUTS, OUTPUTS, RANK = 96, 24, 20, 2
RTOL = 1e-11  # all in double precision


@pytest.fixture
def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [
        random(TOKENS, INPUTS),
        random(INPUTS, OUTPUTS),
        random(INPUTS, RANK),
        random(RANK, OUTPUTS),
    ]


def rewritten(
    fn: Callable[..., Tensor], tensors: list[Tensor], level: Dialect
) -> tuple[fx.GraphModule, Report]:
    """A function's graph after the pass, proven to compute the same."""
    gm = make_fx(fn)(*tensors)
    annotate(gm, tensors)
    report = rewrite_graph(gm.graph, level, Options(strict=True, objective="flops"))
    gm.recompile()
    torch.testing.assert_close(gm(*tensors), fn(*tensors), rtol=RTOL, atol=RTOL)
    return gm, report


def reading(target: Any, reader: Reader) -> Dialect:
    """The ATen level with one line more in its table."""
    return replace(ATEN, readers={**ATEN.readers, target: reader})


def reversed_difference(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.rsub(x @ a @ b, x @ w)


def test_an_operator(tensors: list[Tensor]) -> None:
    """Without its line `rsub` is a border; with it the adapter is merged."""

    def reader(a: Any, b: Any, alpha: Any = 1) -> Form | None:
        return readers.add(b, a, alpha, sign=-1.0)

    _, before = rewritten(reversed_difference, tensors, ATEN)
    _, after = rewritten(reversed_difference, tensors, reading(torch.ops.aten.rsub.Tensor, reader))
    assert before.flops_after == before.flops_before == after.flops_before
    assert after.flops_after == 2 * (TOKENS * INPUTS * OUTPUTS + INPUTS * RANK * OUTPUTS)


@dataclass(frozen=True)
class Negative(Form):
    """`-source`."""

    source: fx.Node

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        return (self.source,)

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        return linear.cut_of(self.source)

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        return scaled(reading.operand(self.source, cut), Scalar(-1.0))


def negated_adapter(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x @ w + -(x @ a @ b)


def test_a_form(tensors: list[Tensor]) -> None:
    """A new class, and a line that makes it of the operator's arguments; nothing else."""
    _, report = rewritten(negated_adapter, tensors, reading(torch.ops.aten.neg.default, Negative))
    assert report.flops_after == 2 * (TOKENS * INPUTS * OUTPUTS + INPUTS * RANK * OUTPUTS)


@pytest.mark.usefixtures("nothing_remembered")
def test_a_law_that_is_wrong_is_caught(
    tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`A B = 2 A B` would make the same value at the same price; the emitted nodes tell."""
    found = Ways._steps

    def steps(self: Ways, value: Value, *args: Any, **kwargs: Any) -> Iterator[Step]:
        for step in found(self, value, *args, **kwargs):
            is_plain = isinstance(step, Product) and len(value.core) == 1
            yield replace(step, right=step.right.scaled(Scalar(2.0))) if is_plain else step

    monkeypatch.setattr(Ways, "_steps", steps)
    with pytest.raises(VerificationError):
        rewritten(lambda x, w, a, b: x @ w + x @ a @ b, tensors, ATEN)


# --- an implementation


def serves(work: Work) -> bool:
    return work.product is not None and work.problem.dims[work.inner] <= 2


NARROW = Implementation(
    "narrow",
    Product,
    lambda work: (Elementwise(work.size),),
    serves,
    is_usual=False,
)


@writes("narrow")
def write(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    assert isinstance(step, Product)
    writer = emission.scope.writer
    a, b, scalar = emission.products.operands(value, step, transposed)
    node = writer.call(torch.ops.aten.linear.default, a, writer.transpose(b))
    return emission.scope.scaled(node, scalar)


@contextmanager
def registering(implementation: Implementation) -> Iterator[None]:
    """A context in which there is one implementation more."""
    register(implementation)
    try:
        yield
    finally:
        del REGISTERED[implementation.name]


def merged_adapter(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x @ (w + 2.0 * (a @ b))


@pytest.mark.usefixtures("nothing_remembered")
@pytest.mark.parametrize("tokens", (3, 37))
def test_an_implementation(tokens: int, tensors: list[Tensor]) -> None:
    """It is chosen because it costs less, written, and proven; without it nothing of it is left."""
    few = [tensors[0][:tokens], *tensors[1:]]
    with registering(NARROW):
        gm, report = rewritten(merged_adapter, few, ATEN)
    assert any(site.changed for site in report.sites)
    narrow = [n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert len(narrow) == 1
    assert NARROW.name not in REGISTERED


@pytest.mark.usefixtures("nothing_remembered")
def test_an_implementation_that_costs_more_is_not_chosen(tensors: list[Tensor]) -> None:
    few = [tensors[0][:41], *tensors[1:]]
    dear = replace(NARROW, operations=lambda work: (MatMul(9, *work.extents, 8),))
    with registering(dear):
        gm, _ = rewritten(merged_adapter, few, ATEN)
    assert not [n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default]


def test_names_of_implementations_are_unique() -> None:
    with registering(NARROW), pytest.raises(ValueError, match="already"):
        register(NARROW)
    with pytest.raises(ValueError, match="already"):
        writes("narrow")


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_every_implementation_is_written(name: str) -> None:
    by_experts = {"pick", "scatter", "grouped", "grouped_outer"}  # read in a pass of their own
    if name != "keep" and name not in by_experts:  # what is kept is not made
        assert callable(writing(name))
