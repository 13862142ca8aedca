"""Reports of compiled models: all graphs of one together, and of several models apart."""

import pytest
import torch
from test_report import OUT, TOKENS, Adapted
from torch import Tensor, nn

import runlora_fx


class Broken(nn.Module):
    """Two adapted layers with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (Adapted(0.0, torch.float32) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).sin()
        torch._dynamo.graph_break()
        made: Tensor = self.two(y[:, : x.shape[1]])
        return made


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def data(tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, 32, requires_grad=True)


def names(report: runlora_fx.Report | None) -> set[str]:
    assert report is not None
    return {name.split(".")[-1] for site in report for name in site.modules}


def test_a_report_has_all_graphs_after_breaks() -> None:
    run = torch.compile(Broken(), backend="runlora_eager", dynamic=False)
    run(data())
    for _ in range(2):
        report = runlora_fx.report_of(run)
        assert report == runlora_fx.last_report()
        assert names(report) == {"one", "two"}
        assert report is not None and report.verdict.startswith("2 of 2 adapted layers rewritten")
        assert report.graph == "joint"
        # What is compiled again takes the place of what it replaces.
        torch._dynamo.reset()
        run(data())
        run(data(TOKENS // 2))
    assert len(runlora_fx.report_of(run) or ()) == len(report)


def test_models_have_reports_of_their_own() -> None:
    layer, other = Adapted(0.0, torch.float32), nn.Linear(32, OUT)
    adapted = torch.compile(layer, backend="runlora_eager", dynamic=False)
    plain = torch.compile(other, backend="runlora_eager", dynamic=False)
    assert runlora_fx.report_of(adapted) is None
    adapted(data())
    plain(data())
    found, last = runlora_fx.report_of(adapted), runlora_fx.last_report()
    assert found is not None and len(found) == 1
    assert last is not None and len(last) == 0
    assert runlora_fx.report_of(plain) == last


def test_functions_and_modules_that_compile_themselves_have_reports() -> None:
    layer = Adapted(0.0, torch.float32)
    run = torch.compile(lambda x: layer(x).cos(), backend="runlora_eager", dynamic=False)
    run(data())
    layer.compile(backend="runlora_eager", dynamic=False)
    layer(data())
    for compiled in (run, layer):
        report = runlora_fx.report_of(compiled)
        assert report is not None and len(report) == 1


@pytest.mark.parametrize("thing", (nn.Linear(2, 2), print, None), ids=str)
def test_what_was_not_compiled_has_no_report(thing: object) -> None:
    with pytest.raises(TypeError, match=r"takes what torch\.compile returned"):
        runlora_fx.report_of(thing)


def test_the_pass_as_a_plug_in_has_a_report_of_its_model() -> None:
    options = {"joint_custom_pre_pass": runlora_fx.RunloraPass(runlora_fx.Options(strict=True))}
    run = torch.compile(Broken(), backend="inductor", dynamic=False, options=options)
    run(data())
    assert names(runlora_fx.report_of(run)) == {"one", "two"}
