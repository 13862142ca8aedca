"""Graphs before and after, as text in `tests/goldens/`: what the rewriting makes of known layers.

``pytest tests/test_goldens.py --update-goldens`` writes them anew; the difference is to be read.
The plans are those with the fewest FLOPs, so they do not depend on a machine.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import HIDDEN
from printed import printed
from test_experts import Picked
from test_grouped import Grouped, ends, rows
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter

import runlora_fx
from runlora_fx.passes import pipeline
from runlora_fx.passes.context import Outcome
from runlora_fx.passes.planning import plan_linear_algebra

FOLDER = Path(__file__).parent / "goldens"
IN, OUT, RANK = 64, 96, 4

#: The numbers of tokens: merging W + s B A pays for the second.
FEW, MANY = 8, 80


class Layer(nn.Module):
    """A layer with random weights, by name.

    Args:
        shapes: Of the weights; those that begin with "frozen" are not trained.
        compute: The layer, from its input and itself.
    """

    def __init__(self, compute: Callable[[Tensor, Any], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.compute = compute
        for name, shape in shapes.items():
            self.register_parameter(name, Parameter(torch.randn(shape) / 8))
            self.get_parameter(name).requires_grad_(not name.startswith("frozen"))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self)


LORA = {"frozen": (OUT, IN), "a": (RANK, IN), "b": (OUT, RANK)}


def lora(x: Tensor, w: Any) -> Tensor:
    return F.linear(x, w.frozen) + 2.0 * F.linear(F.linear(x, w.a), w.b)


def lora_with_bias(x: Tensor, w: Any) -> Tensor:
    return F.linear(x, w.frozen, w.frozen_bias) + 2.0 * F.linear(F.linear(x, w.a), w.b)


def lora_with_dropout(x: Tensor, w: Any) -> Tensor:
    dropped = F.dropout(x, 0.1, True)
    return F.linear(x, w.frozen) + 2.0 * F.linear(F.linear(dropped, w.a), w.b)


def dora(x: Tensor, w: Any) -> Tensor:
    norm = (w.frozen + 2.0 * (w.b @ w.a)).norm(dim=1).detach()
    gain, base = w.magnitude / norm, F.linear(x, w.frozen)
    return base + (gain - 1) * base + gain * 2.0 * F.linear(F.linear(x, w.a), w.b)


def ia3(x: Tensor, w: Any) -> Tensor:
    return F.linear(x, w.frozen, w.frozen_bias) * w.gain


def vera(x: Tensor, w: Any) -> Tensor:
    return F.linear(x, w.frozen) + w.g * F.linear(w.d * F.linear(x, w.frozen_a), w.frozen_b)


def two_adapters(x: Tensor, w: Any) -> Tensor:
    return lora(x, w) + 0.5 * F.linear(F.linear(x, w.c), w.d)


def chain(x: Tensor, w: Any) -> Tensor:
    return F.linear(x, w.frozen) + x @ w.a @ w.core @ w.b


def tokens(count: int, *, grad: bool = True) -> Tensor:
    return torch.randn(count, IN).requires_grad_(grad)


def dynamic_tokens() -> Tensor:
    x = tokens(MANY)
    torch._dynamo.mark_dynamic(x, 0)
    return x


def quantised() -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = Linear4bit(IN, OUT, bias=False, compute_dtype=torch.float32)
            self.base.weight = Params4bit(torch.randn(OUT, IN) / 8, requires_grad=False)
            self.a = Parameter(torch.randn(RANK, IN) / 8)
            self.b = Parameter(torch.randn(OUT, RANK) / 8)

        def forward(self, x: Tensor) -> Tensor:
            base: Tensor = self.base(x)
            return base + 2.0 * F.linear(F.linear(x, self.a), self.b)

    return Quantised().to("cpu")


@dataclass(frozen=True)
class Golden:
    """One case.

    Attributes:
        model: Makes the layer.
        inputs: Makes its inputs.
        trains: Whether its graph is the joint one, of forward and backward.
        needs: A package that has to be installed.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[], list[Any]]
    trains: bool = True
    needs: str = "torch"


def of(compute: Any, count: int, trains: bool = True, **shapes: tuple[int, ...]) -> Golden:
    return Golden(lambda: Layer(compute, **shapes), lambda: [tokens(count, grad=trains)], trains)


GOLDENS: dict[str, Golden] = {
    "lora_few_tokens": of(lora, FEW, False, **LORA),
    "lora_many_tokens": of(lora, MANY, False, **LORA),
    "lora_few_tokens_training": of(lora, FEW, **LORA),
    "lora_many_tokens_training": of(lora, MANY, **LORA),
    "lora_dynamic_training": Golden(lambda: Layer(lora, **LORA), lambda: [dynamic_tokens()]),
    "bias_training": of(lora_with_bias, MANY, **LORA, frozen_bias=(OUT,)),
    "dropout_training": of(lora_with_dropout, MANY, **LORA),
    "dora_training": of(dora, MANY, **LORA, magnitude=(OUT,)),
    "ia3_training": of(ia3, MANY, frozen=(OUT, IN), frozen_bias=(OUT,), gain=(OUT,)),
    "vera_training": of(
        vera,
        MANY,
        **{"frozen": (OUT, IN), "frozen_a": (RANK, IN), "frozen_b": (OUT, RANK)},
        **{"d": (RANK,), "g": (OUT,)},
    ),
    "two_adapters_training": of(two_adapters, MANY, **LORA, c=(2, IN), d=(OUT, 2)),
    "chain_training": of(
        chain, MANY, frozen=(OUT, IN), a=(IN, RANK), core=(RANK, RANK), b=(RANK, OUT)
    ),
    "qlora_training": Golden(quantised, lambda: [tokens(MANY)], needs="bitsandbytes"),
    "experts_picked_training": Golden(
        lambda: Picked(from_left=False, transposed=False),
        lambda: [
            torch.randn(6, HIDDEN, dtype=torch.float64).requires_grad_(),
            torch.tensor([0, 2, 1, 1, 3, 0]),
        ],
    ),
    "experts_grouped_training": Golden(
        lambda: Grouped(transposed=False), lambda: [rows(HIDDEN), ends()]
    ),
}


def graphs(golden: Golden) -> str:
    """The graph of a case as it came and as it is rewritten."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, texts = golden.model(), []
    with torch.set_grad_enabled(golden.trains):
        for name, run in (("before", lambda *_: Outcome()), ("after", plan_linear_algebra)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pipeline, "plan_linear_algebra", run)
                gm = runlora_fx.joint_graph(model, golden.inputs(), strict=True, objective="flops")
            texts.append(f"# {name}\n{printed(gm)}")
    return "\n".join(texts)


def without_numbers(text: str) -> str:
    """The calls of printed graphs in alphabetical order, without the numbers of values."""
    lines = [re.sub(r"\b(in|v)\d+", r"\1", line) for line in text.splitlines()]
    return "\n".join(sorted(line for line in lines if not line.startswith("return")))


@pytest.mark.parametrize("name", GOLDENS)
def test_graphs_are_the_goldens(name: str, request: pytest.FixtureRequest) -> None:
    golden, path = GOLDENS[name], FOLDER / f"{name}.txt"
    if find_spec(golden.needs) is None:
        pytest.skip(f"{golden.needs} is not installed")
    found = graphs(golden)
    if request.config.getoption("--update-goldens"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8")
        return
    wanted = path.read_text(encoding="utf-8")
    if torch.__version__.startswith("2.11."):  # AOTAutograd orders the inputs in another way
        found, wanted = without_numbers(found), without_numbers(wanted)
    difference = "\n".join(difflib.unified_diff(wanted.splitlines(), found.splitlines(), n=2))
    assert found == wanted, f"{path.name} (--update-goldens writes it anew):\n{difference}"


def test_every_golden_has_a_case() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} <= GOLDENS.keys()
