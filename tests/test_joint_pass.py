"""The pass in Inductor: once for every graph, however often it is set or called."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from checks import INDUCTOR, RUNLORA, RUNLORA_EAGER, TAKES_LISTS
from torch import Tensor, fx, nn

import runlora_fx
from runlora_fx import Options, RunloraPass, joint_pass
from runlora_fx.passes.pipeline import rewrite_graph

# Matrix products only, for which Inductor has nothing to compile.
RANDOM = torch.Generator().manual_seed(0)
INPUTS = [torch.randn(size, generator=RANDOM) for size in ((96, 16), (24, 16), (2, 16), (24, 2))]


def lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x @ w.t() + x @ a.t() @ b.t()


class Region(nn.Module):
    """An adapted layer and a projection back, compiled once for all layers like it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(16, 2, bias=False)
        self.up = nn.Linear(2, 24, bias=False)
        self.back = nn.Linear(24, 16, bias=False)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.base(x) + self.up(self.down(x)))


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with (
        inductor_config.patch(fx_graph_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The options of every run of the pass."""
    seen: list[Options] = []

    def rewrite(graph: fx.Graph, dialect: Any, options: Options, *args: Any, **more: Any) -> Any:
        seen.append(options)
        return rewrite_graph(graph, dialect, options, *args, **more)

    monkeypatch.setattr(joint_pass, "rewrite_graph", rewrite)
    return seen


def is_changed() -> bool:
    report = runlora_fx.last_report()
    assert report is not None
    (site,) = report.sites
    return site.changed


def nothing(graph: fx.Graph) -> None:
    pass


SETTINGS: dict[str, Callable[[], Any]] = {
    "one": RunloraPass,
    "list": lambda: [nothing, RunloraPass()],
    "twice in a list": lambda: [RunloraPass(), nothing, RunloraPass()],
}


@pytest.mark.parametrize("backend", (INDUCTOR, RUNLORA))
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_pass_runs_once(setting: str, backend: str, runs: list[Options]) -> None:
    if "list" in setting and backend == INDUCTOR and not TAKES_LISTS:
        pytest.skip("this torch takes one joint pass")
    with inductor_config.patch(joint_custom_pre_pass=SETTINGS[setting]()):
        found = torch.compile(lora, backend=backend, fullgraph=True)(*INPUTS)
    torch.testing.assert_close(found, lora(*INPUTS))
    assert len(runs) == 1
    assert is_changed()


def test_the_options_of_the_backend_are_taken(runs: list[Options]) -> None:
    options: Any = {"runlora.objective": "flops"}
    with inductor_config.patch(joint_custom_pre_pass=RunloraPass(Options(margin=0.5))):
        torch.compile(lora, backend=RUNLORA, options=options)(*INPUTS)
    assert runs == [Options(objective="flops")]


def test_the_pass_as_an_option_of_the_backend(runs: list[Options]) -> None:
    options: Any = {"joint_custom_pre_pass": RunloraPass()}
    torch.compile(lora, backend=RUNLORA, options=options)(*INPUTS)
    assert len(runs) == 1
    assert is_changed()


@pytest.mark.parametrize(
    ("backend", "training"), ((RUNLORA, False), (RUNLORA, True), (RUNLORA_EAGER, True))
)
def test_nested_compile_regions_are_rewritten_once(
    backend: str, training: bool, runs: list[Options]
) -> None:
    """Inductor calls the pass for the region, the whole, and the region's forward and backward."""
    model = nn.Sequential(Region(), Region())
    x = torch.randn(96, 16, requires_grad=training)  # else the first region is one by itself
    run = torch.compile(model, backend=backend, fullgraph=True, options={"runlora.strict": True})
    with torch.set_grad_enabled(training):
        found = run(x)
        torch.testing.assert_close(found, model(x))
    assert is_changed()
    if training:
        grads = {}
        for name, outputs in (("ours", found), ("eager", model(x))):
            grads[name] = torch.autograd.grad(outputs.sum(), list(model.parameters()))
        torch.testing.assert_close(grads["ours"], grads["eager"])
    assert len(runs) <= 2  # the region and the whole
    assert is_changed()
