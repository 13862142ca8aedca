"""The file that a failure leaves behind: run by itself, it shows the same error."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import RUNLORA_EAGER
from processes import python
from recipes import adapted, tiny_llama, tokens
from torch import Tensor, fx, nn

import runlora_fx
from runlora_fx.cost_model.store import FOLDER_VARIABLE
from runlora_fx.passes import planning, rebuild

STAGE = "runlora_fx.passes.planning.decide_all"

# The mistake of the test, made again in a process that runs the file.
WITH_THE_MISTAKE = """
import runpy, sys
from runlora_fx.passes import planning, rebuild
def fail(*_, **__):
    raise RuntimeError("out of luck")
planning.decide_all = fail
runpy.run_path(sys.argv[1])
"""


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(24, 20, bias=False)
        self.lora_A = nn.Linear(24, 2, bias=False)
        self.lora_B = nn.Linear(2, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))
        return result


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path / "reproducers"


def _fail(*_: object, **__: object) -> None:
    raise RuntimeError("out of luck")


def _failed(run: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is logged while a stage fails."""
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STAGE, _fail)
        run()
    return [record.getMessage() for record in caplog.records if record.name == "runlora_fx"]


def _path(warning: str) -> Path:
    found = re.search(r"as it came; please report this, with (\S+\.py), which reproduces", warning)
    assert found is not None, warning
    return Path(found[1])


def _compiled(model: Any, **settings: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(model, backend=RUNLORA_EAGER, **settings)
    return compiled


def _report() -> runlora_fx.Report:
    report = runlora_fx.last_report()
    assert report is not None
    return report


def test_the_file_shows_the_same_error(caplog: pytest.LogCaptureFixture, _folder: Path) -> None:
    x = torch.randn(96, 24)
    (warning,) = _failed(lambda: _compiled(Adapted())(x), caplog)
    path = _path(warning)
    assert path.parent == _folder
    assert "RuntimeError: out of luck" in path.read_text()

    with_the_mistake = python("-c", WITH_THE_MISTAKE, str(path))
    assert with_the_mistake.returncode != 0
    assert with_the_mistake.stderr.rstrip().endswith("RuntimeError: out of luck")

    without_it = python(str(path))
    assert without_it.returncode == 0, without_it.stderr
    assert "is rewritten without an error here" in without_it.stdout


def _assert_like(path: Path, wanted: runlora_fx.Report) -> None:
    """What is planned for a file's graph has the same numbers: FLOPs, times and saved bytes."""
    found = runpy.run_path(str(path))["REPORT"]
    assert (found.flops_before, found.flops_after) == (wanted.flops_before, wanted.flops_after)
    assert found.seconds == wanted.seconds
    assert found.recomputation == wanted.recomputation
    assert [(s.before, s.after) for s in found.sites] == [(s.before, s.after) for s in wanted.sites]


def test_the_file_has_the_graph_of_a_model(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = adapted(tiny_llama(layers=1)), tokens()

    def run() -> None:
        _compiled(model, fullgraph=True)(input_ids=batch, labels=batch)

    (path,) = {_path(warning) for warning in _failed(run, caplog)}
    run()
    wanted = _report()
    assert wanted.flops_after != wanted.flops_before
    _assert_like(path, wanted)


def test_the_file_has_symbolic_sizes(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(Adapted(), nn.GELU(), nn.Linear(20, 4)), torch.randn(4, 30, 24)

    def run() -> None:
        _compiled(model, dynamic=True, fullgraph=True)(x)

    (path,) = {_path(warning) for warning in _failed(run, caplog)}
    assert len(re.findall(r"^s\d+ = FAKES.size\(\d+\)$", path.read_text(), re.MULTILINE)) == 2
    run()
    assert any(site.changed for site in _report().sites)
    _assert_like(path, _report())


def test_graphs_of_torch_functions_and_modules(caplog: pytest.LogCaptureFixture) -> None:
    gm, x = fx.symbolic_trace(Adapted()), torch.randn(96, 24)
    (warning,) = _failed(lambda: runlora_fx.rewrite(gm, [x]), caplog)
    found = runpy.run_path(str(_path(warning)))["REPORT"]
    runlora_fx.rewrite(gm, [x])
    assert (found.graph, found.flops_after) == ("torch", _report().flops_after)


def test_the_same_failure_has_one_file(caplog: pytest.LogCaptureFixture, _folder: Path) -> None:
    layer, x = Adapted(), torch.randn(96, 24)
    paths = [_path(_failed(lambda: _compiled(layer)(x), caplog)[0]) for _ in range(2)]
    assert list(_folder.iterdir()) == [paths[0]] == [paths[1]]


def test_no_file_where_none_can_be_written(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file"))
    layer, x = Adapted(), torch.randn(96, 24)
    _failed(lambda: torch.testing.assert_close(_compiled(layer)(x), layer(x)), caplog)
    messages = [r.getMessage() for r in caplog.records if r.name == "runlora_fx"]
    (warning,) = [message for message in messages if "as it came" in message]
    assert "please report this (options=" in warning


def _unknown(x: Tensor) -> Tensor:
    return x + 1


def test_no_file_for_a_graph_that_calls_code_of_the_user(
    caplog: pytest.LogCaptureFixture, _folder: Path
) -> None:
    gm = fx.symbolic_trace(Adapted())
    (output,) = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_function(_unknown, (output.args[0],)),)
    warnings = _failed(lambda: runlora_fx.rewrite(gm, [torch.randn(96, 24)]), caplog)
    failed = [warning for warning in warnings if "as it came" in warning]
    assert failed
    assert all("please report this (options=" in warning for warning in failed)
    assert not _folder.exists() or not list(_folder.iterdir())


def test_strict_raises_and_writes_no_file(_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "decide_all", _fail)
    gm = fx.symbolic_trace(Adapted())
    with pytest.raises(RuntimeError, match="out of luck"):
        runlora_fx.rewrite(gm, [torch.randn(96, 24)], strict=True)
    assert not _folder.exists()


def test_the_device_of_the_graph_is_not_needed() -> None:
    """A file that comes from a machine with a GPU runs on one without."""
    fakes, made = rebuild.Fakes(), rebuild.Builder()
    sizes = {"x": (4096, 512), "w": (512, 512), "a": (512, 8), "b": (8, 512)}
    x, w, a, b = (made.add("placeholder", name, name=name) for name in sizes)
    mm, add = torch.ops.aten.mm.default, torch.ops.aten.add.Tensor
    low = made.add("call_function", mm, (x, a), name="low")
    parts = [made.add("call_function", mm, pair, name="part") for pair in ((x, w), (low, b))]
    made.add("output", "output", (made.add("call_function", add, (*parts,), name="y"),), name="out")
    report = rebuild.rewrite_again(
        made.module(),
        [fakes.tensor(size, (size[1], 1), torch.bfloat16, "cuda:0") for size in sizes.values()],
        is_aten=True,
        may_guard=True,
        joins_in_place=False,
        parameters=(),
        options={"objective": "flops"},
    )
    assert [site.changed for site in report.sites] == [True]
