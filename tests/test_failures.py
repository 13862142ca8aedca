"""What happens when something goes wrong: a warning, the graph as it came, right results.

Mistakes of the pass are made by patching it. Graph caches are off: on a hit the pass would not run,
and what a patched pass compiled must not be served to others.
"""

import inspect
import pydoc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from checks import (
    INDUCTOR,
    RUNLORA,
    RUNLORA_EAGER,
    TAKES_LISTS,
    assert_same_outputs_and_grads,
    compile_whole,
)
from market import randomise_lora_b
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed

import runlora_fx
from runlora_fx import joint_pass
from runlora_fx.options import Options
from runlora_fx.passes.emit.nodes.node_writer import EmissionError
from runlora_fx.passes.emit.nodes.writer import Writer
from runlora_fx.passes.emit.proof.verify import VerificationError
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.pipeline import rewrite_graph

TOKENS, WIDTH, RANK = 96, 24, 2
RTOL = 1e-11  # all in double precision


class Adapted(nn.Module):
    """A linear layer with a LoRA adapter; square, so that a weight can be taken for its transpose.

    Without a bias and in training Inductor has matrix products only, and no kernel to compile.
    """

    def __init__(self, scaling: float = 2.0) -> None:
        super().__init__()
        self.base_layer = nn.Linear(WIDTH, WIDTH, bias=False)
        self.lora_A = nn.Linear(WIDTH, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, WIDTH, bias=False)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.scaling * self.lora_B(self.lora_A(x))


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
def layer(_compile_anew: None) -> Adapted:
    return Adapted().double()


@pytest.fixture
def x(_compile_anew: None) -> Tensor:
    return torch.randn(TOKENS, WIDTH, dtype=torch.float64)


def _compile(model: Callable[..., Any], backend: str = RUNLORA_EAGER) -> Callable[..., Any]:
    """Compile as users do by default: without `runlora.strict`."""
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What we logged; nothing below a warning is."""
    return [record.getMessage() for record in caplog.records if record.name == "runlora_fx"]


def _report() -> runlora_fx.Report:
    report = runlora_fx.last_report()
    assert report is not None
    return report


def _listing(model: nn.Module, x: Tensor, **options: Any) -> str:
    """The joint graph, as text."""
    torch._dynamo.reset()
    return str(runlora_fx.joint_graph(model, [x], **options).graph)


def _rewritten(layer: nn.Module, x: Tensor, stage: str) -> str:
    """The joint graph as text, after a pass in which a stage fails."""
    seen: list[str] = []

    def look(joint: fx.GraphModule, _: Any, **__: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(STAGES[stage], _fail)
            joint_pass.run(joint.graph, ATEN, Options(), may_guard=True)
        seen.append(str(joint.graph))
        raise NotImplementedError

    backend = aot_autograd(fw_compiler=_nothing, partition_fn=look)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed):
        torch.compile(layer, backend=backend)(x)
    return seen[0]


def _nothing(gm: fx.GraphModule, _: Any) -> Any:
    return gm


def _chain(n: int) -> nn.Module:
    """Adapted layers with GELUs between them; the second scales by 3."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Adapted(3.0 if i == 1 else 2.0) for i in range(n))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = nn.functional.gelu(layer(x))
            return x

    return Model().double()


def _calls(gm: fx.GraphModule) -> list[object]:
    """What a graph calls, in order."""
    return [node.target for node in gm.graph.nodes]


def _fail(*_: object, **__: object) -> None:
    raise RuntimeError("out of luck")


# --- the pass fails

MATMUL, ADDMM = Writer.matmul, Writer.addmm
PASSES = "runlora_fx.passes."
STAGES = {
    "read": PASSES + "read.analysis.GraphReader.__init__",
    "pose": PASSES + "read.analysis.Poser.pose",
    "search": PASSES + "planning.decide_all",
    "plan of the whole graph": PASSES + "emit.apply.Task",
    "emit": PASSES + "emit.apply.Emitter.emit",
    "verify": PASSES + "emit.copies.roots.verify",
    "replace": "torch.fx.Node.replace_all_uses_with",
    "take copies out": PASSES + "emit.apply._drop_copies",
    # In graphs of ATen operators, or in joint ones.
    "tag": PASSES + "emit.apply.recompute",
    "keep weights": PASSES + "emit.apply.stop_keeping_what_escapes",
    "dequantised": PASSES + "emit.apply.recompute_dequantised",
    "report": PASSES + "pipeline._report",
    "describe": PASSES + "pipeline.describe",
    "flops": PASSES + "pipeline._flops",
}

#: What fails in joint graphs only.
JOINT = ("tag", "keep weights", "dequantised")

#: What only tells what was done: the graph is rewritten all the same.
TELLS = ("report", "describe", "flops")


@pytest.mark.parametrize("stage", [s for s in STAGES if s not in TELLS])
def test_failing_pass_warns_once_and_leaves_the_graph_as_it_came(
    stage: str,
    layer: Adapted,
    x: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    x.requires_grad_()
    as_it_came = _listing(layer, x, margin=0.9)
    assert _listing(layer, x) != as_it_came

    assert _rewritten(layer, x, stage) == as_it_came
    (warning,) = _warnings(caplog)
    assert "as it came; please report this" in warning
    assert "runlora.strict" in warning  # how to see more
    assert "RuntimeError: out of luck" in warning
    (refusal,) = _report().refusals
    assert "RuntimeError: out of luck" in refusal.reason
    assert not any(site.changed for site in _report().sites)
    assert _report().flops_after == _report().flops_before

    monkeypatch.setattr(STAGES[stage], _fail)
    if not STAGES[stage].startswith("torch"):
        assert_same_outputs_and_grads(layer, _compile(layer), [x], RTOL)
        assert len(_warnings(caplog)) == 2


@pytest.mark.parametrize("stage", TELLS)
def test_a_failing_report_costs_nothing_but_the_report(
    stage: str,
    layer: Adapted,
    x: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rewritten = _listing(layer, x)
    monkeypatch.setattr(STAGES[stage], _fail)
    assert _listing(layer, x) == rewritten
    (warning,) = _warnings(caplog)
    assert "could not describe" in warning
    assert "RuntimeError: out of luck" in warning
    assert not _report().sites


def test_a_failure_after_the_first_replacement_costs_its_region_only(
    x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is called once something is replaced: the other layers keep their gains."""
    model = _chain(4)
    for fails in ("add_2", "add_3"):
        _check_that_one_fails(model, x, fails, monkeypatch, caplog)


def _check_that_one_fails(
    model: nn.Module,
    x: Tensor,
    fails: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.clear()
    erase = fx.Graph.erase_node

    def erase_but(self: fx.Graph, node: fx.Node) -> None:
        if node.name == fails and "emit" in str(inspect.stack()[1].filename):
            raise RuntimeError("out of luck")
        erase(self, node)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(fx.Graph, "erase_node", erase_but)
        graph = runlora_fx.rewrite(fx.symbolic_trace(model), [x])
    torch.testing.assert_close(graph(x), model(x))
    assert len(_warnings(caplog)) == 1
    assert sum(site.changed for site in _report().sites) == 3
    assert fails in _report().refusals[0].nodes[0]


@pytest.mark.parametrize("stage", ("search", "pose", "describe"))
def test_a_failure_before_costs_its_region_only(
    stage: str, x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of four layers the one that multiplies by 3 fails."""
    model = _chain(4)
    found: Any = pydoc.locate(STAGES[stage])

    def fail_for_three(*args: Any, **kwargs: Any) -> Any:
        seen = args[0] if stage != "pose" else args[1]
        if "3.0" in repr(seen if stage != "pose" else seen.demands):
            raise RuntimeError("out of luck")
        return found(*args, **kwargs)

    monkeypatch.setattr(STAGES[stage], fail_for_three)
    assert_same_outputs_and_grads(model, _compile(model), [x], RTOL)
    (warning,) = _warnings(caplog)
    assert "out of luck" in warning
    changed = [site.modules for site in _report().sites if site.changed]
    assert changed == [("layers.0",), ("layers.2",), ("layers.3",)]


def test_failing_in_the_midst_takes_back_what_was_written(
    layer: Adapted, x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    as_it_came = _listing(layer, x, margin=0.9)
    calls = iter(range(3))

    def fail_later(self: Writer, a: fx.Node, b: fx.Node) -> fx.Node:
        if next(calls) == 2:
            raise RuntimeError("out of luck")
        return MATMUL(self, a, b)

    monkeypatch.setattr(Writer, "matmul", fail_later)
    assert _listing(layer, x) == as_it_came
    assert next(calls, None) is None
    assert "out of luck" in _warnings(caplog)[0]


def test_a_call_that_cannot_be_made_is_taken_back(
    layer: Adapted, x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch refuses the call when its example value is computed: the sizes do not fit."""
    as_it_came = _listing(layer, x, margin=0.9)
    monkeypatch.setattr(Writer, "addmm", lambda self, c, a, b, by: ADDMM(self, c, b, a, by))
    assert _listing(layer, x) == as_it_came
    assert len(_warnings(caplog)) == 1
    assert "erase" not in _warnings(caplog)[0]  # torch's complaint, not one of our cleaning up


def test_failing_pass_under_inductor(
    layer: Adapted, x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(STAGES["search"], _fail)
    with torch.no_grad():
        torch.testing.assert_close(_compile(layer, RUNLORA)(x), layer(x))
    assert len(_warnings(caplog)) == 1
    with pytest.raises(BackendCompilerFailed, match="out of luck"):
        compile_whole(layer, RUNLORA)(x)


@pytest.mark.parametrize("stage", [s for s in STAGES if s not in (*JOINT, "replace")])
def test_failing_pass_raises_under_strict(
    stage: str,
    layer: Adapted,
    x: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(STAGES[stage], _fail)
    with pytest.raises(BackendCompilerFailed) as caught:
        compile_whole(layer, RUNLORA_EAGER)(x)
    assert str(caught.value.inner_exception) == "out of luck"
    with pytest.raises(RuntimeError, match="out of luck"):
        runlora_fx.rewrite(fx.symbolic_trace(layer), [x], strict=True)
    assert not _warnings(caplog)


# --- the pass writes something wrong


def _wrong_operand(self: Writer, a: fx.Node, b: fx.Node) -> fx.Node:
    rows, columns = b.meta["val"].shape
    return MATMUL(self, a, self.transpose(b) if rows == columns else b)


def _wrong_coefficient(self: Writer, c: fx.Node, a: fx.Node, b: fx.Node, alpha: float) -> fx.Node:
    return ADDMM(self, c, a, b, 1.5 * alpha)


def _lost_addend(self: Writer, c: fx.Node, a: fx.Node, b: fx.Node, alpha: float) -> fx.Node:
    return c


def _unwritable(self: Writer, *_: object) -> fx.Node:
    raise EmissionError("no way to write it")


MISTAKES: dict[str, tuple[str, Callable[..., fx.Node], type[Exception]]] = {
    "wrong operand": ("matmul", _wrong_operand, VerificationError),
    "wrong coefficient": ("addmm", _wrong_coefficient, VerificationError),
    "lost addend": ("addmm", _lost_addend, VerificationError),
    "cannot be written": ("addmm", _unwritable, EmissionError),
}


@pytest.fixture(params=MISTAKES)
def mistake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Exception]:
    """A mistake made by the writer, and the error that it has to lead to."""
    method, wrong, error = MISTAKES[request.param]
    monkeypatch.setattr(Writer, method, wrong)
    return error


def test_mistake_warns_once_and_leaves_the_region_as_it_came(
    mistake: type[Exception], layer: Adapted, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    as_it_came = _listing(layer, x, margin=0.9)
    assert _listing(layer, x) == as_it_came
    (warning,) = _warnings(caplog)
    assert "as it came; please report this" in warning

    report = _report()
    (refusal,) = report.refusals
    assert refusal.reason.startswith("could not be rewritten")
    assert report.flops_after == report.flops_before
    assert_same_outputs_and_grads(layer, _compile(layer), [x], RTOL)


def test_mistake_is_not_reported_as_a_change(
    mistake: type[Exception], layer: Adapted, x: Tensor
) -> None:
    _listing(layer, x)
    (site,) = _report().sites
    assert not site.changed
    assert site.after == site.before
    assert not site.reason.startswith("changed")
    (cause,) = site.causes
    assert cause.name == "failure"
    assert "runlora.strict=True" in cause.remedy
    (refusal,) = _report().refusals
    assert refusal.cause == cause


def test_mistake_raises_under_strict(
    mistake: type[Exception], layer: Adapted, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        compile_whole(layer, RUNLORA_EAGER)(x)
    assert type(caught.value.inner_exception) is mistake
    assert not _warnings(caplog)


def test_mistake_in_a_single_graph(
    mistake: type[Exception], layer: Adapted, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    gm = fx.symbolic_trace(layer)
    calls = _calls(gm)
    rewritten = runlora_fx.rewrite(gm, [x])
    assert len(_warnings(caplog)) == 1
    assert _calls(rewritten) == calls
    with pytest.raises(mistake):
        runlora_fx.rewrite(gm, [x], strict=True)
    assert _calls(gm) == calls


def test_mistake_in_one_region_does_not_hold_up_the_others(
    x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong_for_three(self: Writer, c: fx.Node, a: fx.Node, b: fx.Node, by: float) -> fx.Node:
        return ADDMM(self, c, a, b, 4 if by == 3 else by)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = OrderedDict(first=Adapted(), act=nn.GELU(), second=Adapted(3.0))
            self.layers = nn.Sequential(layers)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    model = Model().double()
    monkeypatch.setattr(Writer, "addmm", wrong_for_three)
    assert_same_outputs_and_grads(model, _compile(model), [x], RTOL)
    assert len(_warnings(caplog)) == 1
    changed = [(*site.modules, site.changed) for site in _report().sites]
    assert changed == [("layers.first", True), ("layers.second", False)]


# --- adapters that are not found


def _peft(layer: nn.Module, **more: nn.Module) -> PeftModel:
    """A model of adapted layers: the given one is called "adapted"."""
    layers = OrderedDict(adapted=layer, **more)
    targets = [name for name, module in layers.items() if not isinstance(module, nn.Flatten)]
    model = get_peft_model(nn.Sequential(layers), LoraConfig(r=RANK, target_modules=targets))
    randomise_lora_b(model)
    return model


@pytest.mark.parametrize("training", (True, False), ids=("training", "inference"))
def test_adapters_none_of_which_is_found_are_reported(
    training: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = _peft(nn.Conv1d(4, 4, 3, groups=2)), torch.randn(2, 4, 8)
    compiled = _compile(model)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(inputs), model(inputs))
    (warning,) = _warnings(caplog)
    assert "found no low-rank site, although the model has adapters" in warning
    assert "base_model.model.adapted" in warning
    (refusal,) = _report().refusals
    assert refusal.nodes == ("base_model.model.adapted",)
    assert "NO low-rank site" in str(_report())


def test_an_adapter_that_is_not_found_among_others_stands_in_the_report(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = _peft(nn.Conv1d(4, 4, 3, groups=2), flat=nn.Flatten(), linear=nn.Linear(24, 24))
    inputs = torch.randn(TOKENS, 4, 8)
    torch.testing.assert_close(_compile(model)(inputs), model(inputs))
    assert not _warnings(caplog)
    report = _report()
    assert [name for site in report.sites for name in site.modules] == ["base_model.model.linear"]
    (refusal,) = report.refusals
    assert refusal.nodes == ("base_model.model.adapted",)
    assert "convolution" in refusal.reason
    assert "left alone: no low-rank product of matrices was read" in str(report)


def test_a_model_without_adapters_is_silent(x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).double()
    before = _listing(model, x, margin=0.9)
    assert _listing(model, x) == before
    assert_same_outputs_and_grads(model, _compile(model), [x], RTOL)
    assert not _warnings(caplog)
    assert not _report().sites
    assert not _report().refusals


# --- the user's own joint pass


@pytest.mark.parametrize("where", ("option", "config", "list", "option over config"))
def test_users_joint_pass_runs_as_under_inductor_and_before_ours(
    where: str, layer: Adapted, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "list" and not TAKES_LISTS:
        pytest.skip("this torch takes one joint pass")
    seen: list[str] = []

    def ours(*args: Any, **settings: Any) -> runlora_fx.Report:
        seen.append("ours")
        return rewrite_graph(*args, **settings)

    def theirs(_: fx.Graph) -> None:
        seen.append("theirs")

    def not_run(_: fx.Graph) -> None:
        seen.append("overruled")

    monkeypatch.setattr("runlora_fx.joint_pass.rewrite_graph", ours)
    in_config = {"option": None, "option over config": not_run, "list": [theirs, theirs]}
    options: Any = {"joint_custom_pre_pass": theirs} if "option" in where else None
    with inductor_config.patch(joint_custom_pre_pass=in_config.get(where, theirs)), torch.no_grad():
        for backend in (INDUCTOR, RUNLORA):
            torch._dynamo.reset()
            found = torch.compile(layer, backend=backend, options=options)(x)
            torch.testing.assert_close(found, layer(x))
    inductors = ["theirs"] * (2 if where == "list" else 1)
    assert seen == [*inductors, *inductors, "ours"]
    assert _report().sites[0].changed


def test_a_failing_pass_of_the_users_is_not_taken_for_ours(
    layer: Adapted, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        inductor_config.patch(joint_custom_pre_pass=_fail),
        pytest.raises(BackendCompilerFailed, match="out of luck"),
    ):
        _compile(layer, RUNLORA)(x)
    assert not _warnings(caplog)


# --- graphs with nothing to win


def _lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x @ w.t() + x @ a.t() @ b.t()


def _random(dtype: torch.dtype, tokens: int = TOKENS, width: int = 16, rank: int = 2) -> list[Any]:
    sizes = (tokens, width), (24, width), (rank, width), (24, rank)
    return [(4 * torch.randn(size, dtype=torch.float64)).to(dtype) for size in sizes]


# Functions and inputs for which the graph runs as it came.
NOTHING_TO_WIN: dict[str, tuple[Callable[..., Tensor], Callable[[], list[Tensor]]]] = {
    "int32": (_lora, lambda: _random(torch.int32)),
    "int64": (_lora, lambda: _random(torch.int64)),
    "complex64": (_lora, lambda: _random(torch.complex64)),
    "no tokens": (_lora, lambda: _random(torch.float64, tokens=0)),
    "rank zero": (_lora, lambda: _random(torch.float64, rank=0)),
    "no product": (lambda x: torch.sin(2 * x).sum(0), lambda: _random(torch.float64)[:1]),
    "booleans": (lambda x: ~x & x.t(), lambda: [torch.eye(4) > 0]),
}


@pytest.mark.parametrize("case", NOTHING_TO_WIN)
def test_nothing_to_win(case: str, caplog: pytest.LogCaptureFixture) -> None:
    fn, make = NOTHING_TO_WIN[case]
    inputs = make()
    gm = fx.symbolic_trace(fn)
    rewritten = runlora_fx.rewrite(gm, inputs, strict=True)
    assert str(rewritten.graph) == str(gm.graph)
    for run in (rewritten, _compile(fn)):
        torch.testing.assert_close(run(*inputs), fn(*inputs), rtol=0, atol=0)
    assert not any(site.changed for site in _report().sites)
    assert not _warnings(caplog)


@pytest.mark.parametrize("size", ("tokens", "width", "rank"))
def test_gradients_of_empty_matrices(size: str, caplog: pytest.LogCaptureFixture) -> None:
    inputs = [t.requires_grad_() for t in _random(torch.float64, **{size: 0})]
    assert_same_outputs_and_grads(_lora, _compile(_lora), inputs, RTOL)
    assert len(_report().sites) == 1
    assert not _warnings(caplog)


# --- modification in place


def _input_afterwards(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = _lora(x, w, a, b)
    x.add_(1)
    return y


def _input_in_between(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    base = x @ w.t()
    x.mul_(2)
    return base + x @ a.t() @ b.t()


def _weight_merged_and_unmerged(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    w += b @ a
    y = x @ w.t()
    w -= b @ a
    return y


def _part_of_the_output(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = x @ w.t()
    y[:, :8] += (x @ a.t() @ b.t())[:, :8]
    return y


@pytest.mark.parametrize(
    "fn",
    (_input_afterwards, _input_in_between, _weight_merged_and_unmerged, _part_of_the_output),
)
@pytest.mark.parametrize("backend", (RUNLORA_EAGER, RUNLORA))
def test_modification_in_place(backend: str, fn: Callable[..., Tensor]) -> None:
    inputs = _random(torch.float64)
    ours, wanted = ([t.clone() for t in inputs] for _ in range(2))
    options: Any = {"runlora.strict": True}
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=backend, fullgraph=True, options=options)
    torch.testing.assert_close(compiled(*ours), fn(*wanted))
    torch.testing.assert_close(ours, wanted)  # what was modified


def test_buffers_are_updated(x: Tensor) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(Adapted(), nn.BatchNorm1d(WIDTH), Adapted()).double()

    model, reference = make(), make()
    for _ in range(2):
        torch.testing.assert_close(_compile(model)(x), reference(x))
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))
    assert dict(model.named_buffers())["1.num_batches_tracked"] == 2
    assert all(site.changed for site in _report().sites)


# --- rewriting without shapes


def test_rewrite_without_shapes_says_what_to_do(layer: Adapted) -> None:
    with pytest.raises(ValueError, match=r"give example_inputs, or .* \(missing on x\)"):
        runlora_fx.rewrite(fx.symbolic_trace(layer))


def test_rewrite_with_too_few_inputs_says_how_many() -> None:
    with pytest.raises(ValueError, match="the graph has 4 inputs, got 1 example inputs"):
        runlora_fx.rewrite(fx.symbolic_trace(_lora), [torch.randn(96, 16)])
