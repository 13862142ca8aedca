"""Biases: a broadcast is read as a column of ones times a row, and every plan is written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import RUNLORA_EAGER, ours, outputs_and_grads
from peft import IA3Config, get_peft_model
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import runlora_fx

Shapes = list[tuple[int, ...]]


def _scaled(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    return (F.linear(x, w, b) * v).sin()


def _multiplied(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return (F.linear(x, w, b) @ y).sin()


def _multiplied_again(a: Tensor, c: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    v = F.linear(a, c, b)
    return (v @ c).sin(), v.sin(), (v.t() @ v).cos()


def _as_column(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = w @ x.t() + b[:, None]
    return (z @ y).sin(), (z.t() @ w).sin()


def _gram(x: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
    return (F.linear(x, w, b).t() @ F.linear(x, v, c)).sin()


def _low_rank(x: Tensor, w: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return F.linear(F.linear(F.linear(x, w, b), u), v).sin()


def _column_of_gates(x: Tensor, w: Tensor, b: Tensor, v: Tensor, a: Tensor) -> Tensor:
    return (((F.linear(x, w, b) * v) @ a) * v).sin()


def _added_twice(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """The graph adds ``1 b'`` to itself, which is no step that makes it."""
    h = w @ x.t()
    v = F.linear(h, h, b).t()
    y = v + 2 * b + 2 * b
    return F.linear(y, v, b).sin(), y.cos()


CASES: list[tuple[Callable[..., Any], Shapes]] = [
    (_scaled, [(5, 8), (6, 8), (6,), (6,)]),
    (_scaled, [(2, 5, 8), (6, 8), (6,), (6,)]),
    (_added_twice, [(12, 6), (10, 6), (10,)]),
    (_column_of_gates, [(5, 6), (1, 6), (1,), (1,), (1, 6)]),
    (_multiplied, [(5, 8), (6, 8), (6,), (6, 2)]),
    (_multiplied, [(40, 8), (6, 8), (6,), (6, 3)]),
    (_multiplied, [(2, 3), (4, 3), (4,), (4, 1)]),
    (_multiplied, [(5, 1), (6, 1), (6,), (6, 2)]),
    (_multiplied_again, [(5, 8), (6, 8), (6,)]),
    (_multiplied_again, [(5, 2), (6, 2), (6,)]),
    (_multiplied_again, [(1, 8), (6, 8), (6,)]),
    (_as_column, [(5, 8), (6, 8), (6,), (5, 2)]),
    (_as_column, [(5, 8), (1, 8), (1,), (5, 2)]),
    (_gram, [(40, 3), (6, 3), (6,), (7, 3), (7,)]),
    (_gram, [(3, 9), (6, 9), (6,), (7, 9), (7,)]),
    (_low_rank, [(3, 9), (8, 9), (8,), (2, 8), (9, 2)]),
    (_low_rank, [(90, 9), (8, 9), (8,), (1, 8), (9, 1)]),
]
every_case = pytest.mark.parametrize(
    ("fn", "shapes"), CASES, ids=[f"{fn.__name__[1:]}{shapes[0]}" for fn, shapes in CASES]
)


def _given(shapes: Shapes, *, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [x.requires_grad_(grad) for x in made]


def _same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


@every_case
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_joint_and_inference_graphs(
    fn: Callable[..., Any], shapes: Shapes, dynamic: bool, grad: bool
) -> None:
    torch._dynamo.reset()
    given = _given(shapes, grad=grad)
    options: Any = {"runlora.strict": True}
    compiled = torch.compile(
        fn, backend="runlora_eager", dynamic=dynamic, fullgraph=True, options=options
    )
    _same(outputs_and_grads(compiled, given), outputs_and_grads(fn, given))
    report = runlora_fx.last_report()
    assert report is not None
    assert not report.refusals


@every_case
def test_graphs_of_torch_functions(fn: Callable[..., Any], shapes: Shapes) -> None:
    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> fx.GraphModule:
        return runlora_fx.rewrite(gm, strict=True)

    torch._dynamo.reset()
    given = _given(shapes, grad=True)
    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    _same(outputs_and_grads(compiled, given), outputs_and_grads(fn, given))


@every_case
def test_differentiable_aten_graphs(fn: Callable[..., Any], shapes: Shapes) -> None:
    given = _given(shapes)
    rewritten = runlora_fx.rewrite(make_fx(fn)(*given), given, strict=True)
    _same(outputs_and_grads(rewritten, given), outputs_and_grads(fn, given))


@pytest.mark.parametrize("bias", [True, False])
def test_ia3_in_evaluation_with_any_number_of_tokens(bias: bool) -> None:
    layers = nn.Sequential(nn.Linear(32, 48, bias=bias), nn.GELU(), nn.Linear(48, 32, bias=bias))
    model = get_peft_model(
        layers, IA3Config(target_modules=["0", "2"], feedforward_modules=["2"])
    ).eval()
    for name, weight in model.named_parameters():
        if "ia3" in name:
            nn.init.normal_(weight, 1.0, 0.2)
    compiled = torch.compile(
        model, backend=RUNLORA_EAGER, dynamic=True, fullgraph=True, options=ours()
    )
    torch._dynamo.reset()
    with torch.no_grad():
        for tokens in (5, 48, 200):
            x = torch.randn(2, tokens, 32)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
