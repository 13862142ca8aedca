"""Calls of modules, as ``symbolic_trace`` leaves them: read in place, left where nothing changes.

call_module base(x) + call_module up(call_module down(x))   ->   x (W + B A)' + bias
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import runlora_fx

IN, OUT, RANK = 24, 32, 2
MANY, FEW = 96, 4


class Adapted(nn.Module):
    """``base(x) + up(down(drop(x)))``, and a layer that has no adapter."""

    def __init__(self, base: nn.Module | None = None, drop: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(IN, OUT) if base is None else base
        self.drop = nn.Dropout(0.0) if drop is None else drop
        self.down = nn.Linear(IN, RANK, bias=False)
        self.up = nn.Linear(RANK, OUT, bias=False)
        self.head = nn.Linear(OUT, IN)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(self.drop(x)))
        head: Tensor = self.head(y.relu())
        return head


class OwnLinear(nn.Linear):
    """A subclass may compute anything."""


def activation(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, tokens // 2, IN, generator=generator, dtype=torch.float64)


def rewritten(model: nn.Module, tokens: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A trace and what is made of it, which computes the same."""
    x = activation(tokens)
    traced = fx.symbolic_trace(model.double())
    new = runlora_fx.rewrite(traced, (x,), strict=True, objective="flops")
    torch.testing.assert_close(new(x), model(x), rtol=1e-12, atol=1e-12)
    return traced, new


def modules(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("drop", (nn.Dropout(0.0), nn.Identity()))
def test_an_adapter_is_merged_and_other_modules_are_called_as_before(drop: nn.Module) -> None:
    _, new = rewritten(Adapted(drop=drop), MANY)
    assert modules(new) == ["head"]
    (head,) = (node for node in new.graph.nodes if node.op == "call_module")
    assert head.name == "head"
    read = sorted(str(node.target) for node in new.graph.nodes if node.op == "get_attr")
    assert read == ["base.bias", "base.weight", "down.weight", "up.weight"]
    report = runlora_fx.last_report()
    assert report is not None
    assert [site.changed for site in report.sites].count(True) == 1


def test_where_nothing_is_gained_the_graph_stays_as_it_is() -> None:
    traced, new = rewritten(Adapted(), FEW)
    before, after = ([(n.op, n.target, n.name) for n in gm.graph.nodes] for gm in (traced, new))
    assert before == after


def hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda module, args, result: 2 * result)
    return linear


def hooked_backwards(linear: nn.Linear) -> nn.Linear:
    linear.register_full_backward_pre_hook(lambda module, gradients: None)
    return linear


def patched(linear: nn.Linear) -> nn.Linear:
    """With another ``forward``, as libraries wrap modules that they move or offload."""
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    return linear


@pytest.mark.parametrize(
    "base",
    (
        lambda: hooked(nn.Linear(IN, OUT)),
        lambda: hooked_backwards(nn.Linear(IN, OUT)),
        lambda: patched(nn.Linear(IN, OUT)),
        lambda: parametrizations.weight_norm(nn.Linear(IN, OUT)),
        lambda: OwnLinear(IN, OUT),
    ),
    ids=("hooked", "hooked backwards", "patched", "parametrised", "a subclass"),
)
def test_a_module_that_may_compute_more_is_not_read(base: Callable[[], nn.Module]) -> None:
    traced, new = rewritten(Adapted(base()), MANY)
    assert "base" in modules(new) or "base" not in modules(traced)


def test_dropout_that_drops_is_not_read() -> None:
    x = activation(MANY)
    traced = fx.symbolic_trace(Adapted(drop=nn.Dropout(0.5)).double().train())
    new = runlora_fx.rewrite(traced, (x,), strict=True, objective="flops")
    assert "drop" in modules(new)


def test_the_dtype_of_a_result_that_vanishes_is_asked_of_its_operand() -> None:
    class Model(Adapted):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.base(x)
            return y + self.up(self.down(x)).to(y.dtype)

    _, new = rewritten(Model(), MANY)
    assert not modules(new)
    assert sum(node.target is torch.matmul for node in new.graph.nodes) == 1


def test_a_result_that_others_read_keeps_its_dtype_to_ask_for() -> None:
    class Model(Adapted):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y: Tensor = self.base(x)
            return y + self.up(self.down(x)).to(y.dtype), y.relu()

    x = activation(MANY)
    model = Model().double()
    new = runlora_fx.rewrite(fx.symbolic_trace(model), (x,), strict=True, objective="flops")
    for found, wanted in zip(new(x), model(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_module_is_called_before_its_weight_is_modified() -> None:
    """The call reads the weight as it was, and a call behind it as it is then."""
    model = Adapted().double()
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_module("base", (x,))
    low = graph.call_module("up", (graph.call_module("down", (x,)),))
    graph.call_method("mul_", (graph.get_attr("base.weight"), 2.0))
    second = graph.call_module("base", (x,))
    graph.output((graph.call_method("add", (first, low)), graph.call_method("add", (second, low))))
    weight, given = model.base.weight.detach().clone(), activation(MANY)
    with torch.no_grad():
        wanted = fx.GraphModule(model, graph)(given)
        model.base.weight.copy_(weight)
        new = runlora_fx.rewrite(fx.GraphModule(model, graph), (given,), strict=True)
        assert torch.equal(model.base.weight, weight)
        for found, value in zip(new(given), wanted, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)


def test_two_calls_of_one_module_share_its_weight() -> None:
    class Model(Adapted):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.base(x) + self.up(self.down(x))
            z: Tensor = self.base(2 * x) + self.up(self.down(2 * x))
            return y.relu() + z.relu()

    _, new = rewritten(Model(), MANY)
    assert not modules(new)
    read = [str(node.target) for node in new.graph.nodes if node.op == "get_attr"]
    assert read.count("base.weight") == 1
