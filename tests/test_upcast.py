"""Products of 16-bit matrices in float32: which ones run so, what they compute, what stays."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import ours, saved_bytes
from peft import LoraConfig, get_peft_model
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import runlora_fx
from runlora_fx import late_pass
from runlora_fx._torch_compat import LATE_PASS
from runlora_fx.cost_model import store
from runlora_fx.cost_model.cost import TERMS
from runlora_fx.cost_model.devices import calibration
from runlora_fx.cost_model.devices.calibration import rates
from runlora_fx.cost_model.devices.elsewhere import machine_for
from runlora_fx.cost_model.devices.machine import Machine, key_of
from runlora_fx.cost_model.ops import GemmShape, MatMul, UpcastMatMul
from runlora_fx.cost_model.profile import MachineProfile
from runlora_fx.cost_model.store import Record
from runlora_fx.options import Options
from runlora_fx.passes.upcast import upcast

CPU = torch.device("cpu")
aten = torch.ops.aten
CAST = torch.ops.prims.convert_element_type.default

#: A CPU without instructions for 16 bits [s].
SLOW = {
    **{"flops.nn": 5e-10, "flops.nt": 1e-10, "flops.tn": 5e-11, "flops.upcast": 1e-11},
    **{"read": 1e-18, "written": 1e-10, "elementwise": 5e-11, "launches": 2e-6},
}
PROFILE = MachineProfile(SLOW)
TOKENS, WIDTH, RANK = 256, 64, 4


def profiles(device: torch.device, dtype: str) -> MachineProfile:
    return PROFILE if dtype != "float32" else MachineProfile({"flops.nn": 1e-11})


# -- which products -------------------------------------------------------------------------------


def test_the_faster_way_is_predicted_for_each_product() -> None:
    large = MatMul(1, 512, 512, 512, 2, (False, True))
    vector = MatMul(1, 1, 512, 512, 2, (False, True))
    assert PROFILE.upcasts(large)
    assert not PROFILE.upcasts(vector)  # a cast of its matrix takes longer
    assert not PROFILE.as_they_are.upcasts(large)
    assert not MachineProfile({**SLOW, "flops.upcast": 2e-10}).upcasts(large)


def test_the_price_of_products_in_float32_is_that_of_their_flops_and_casts() -> None:
    cost = UpcastMatMul(MatMul(2, 3, 5, 7, 2)).cost
    assert cost["flops.upcast"] == cost.flops == 2 * 2 * 3 * 5 * 7
    assert cost["elementwise"] == 6 * 2 * (3 * 5 + 5 * 7 + 3 * 7)


def test_rates_are_those_of_the_faster_way() -> None:
    per = PROFILE.seconds_per
    assert {per[name] for name in ("flops.nn", "flops.nt", "flops.tn")} == {1e-11}
    assert per["read"] == pytest.approx(1.5e-10)
    assert PROFILE.as_they_are.seconds_per["flops.nt"] == 1e-10
    # Instructions for 16 bits: products in float32 are slower, and nothing changes.
    fast = MachineProfile({**SLOW, "flops.upcast": 1e-9})
    kept = {name: fast.seconds_per[name] for name in TERMS if name != "flops.upcast"}
    assert kept == {name: fast.as_they_are.seconds_per[name] for name in kept}


def test_a_measured_product_counts_if_it_runs_as_it_was_measured() -> None:
    shape = GemmShape(1, 512, 512, 512, False, True).canonical
    known = MachineProfile(SLOW, ((shape, 1.0),))
    assert known.as_they_are.measured_seconds(shape.product(2)) == 1.0
    assert known.measured_seconds(shape.product(2)) is None


def test_a_machine_knows_if_products_are_to_run_in_float32(no_profile: Path) -> None:
    assert not Machine(use_stored=True, upcasts=True).upcasts
    store.add(key_of(CPU, "bfloat16"), Record(SLOW))
    assert Machine(use_stored=True, upcasts=True).upcasts
    assert not Machine(use_stored=True).upcasts
    assert not Machine(use_stored=False, upcasts=True).upcasts
    assert not machine_for("h100", use_stored=True, upcasts=True).upcasts
    plain = Machine(use_stored=True).profile(CPU, "bfloat16")
    assert plain.seconds_per["flops.nt"] == SLOW["flops.nt"]


def test_options_and_settings_that_leave_products_as_they_are(
    no_profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(key_of(CPU, "bfloat16"), Record(SLOW))
    assert late_pass.machine_of(Options()).upcasts
    for options in (
        *(Options(upcast=False), Options(numerics="strict"), Options(objective="flops")),
        *(Options(tune="off"), Options(device="h100")),
    ):
        assert not late_pass.machine_of(options).upcasts
    # Inductor tunes products itself, or another pass stands where ours would.
    assert not late_pass.machine_of(Options(), {"max_autotune": True}).upcasts
    assert not late_pass.machine_of(Options(), {LATE_PASS: print}).upcasts


def test_calibration_measures_them_for_16_bits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_QUICK", ((8, 32), (64,), (4,)))
    monkeypatch.setattr(calibration, "_QUICK_ERROR", 1e9)  # small products, on a busy machine
    found = {dtype: rates(CPU, dtype, 60.0) for dtype in ("bfloat16", "float32")}
    for dtype, known in found.items():
        assert known is not None
        assert ("flops.upcast" in known) == (dtype == "bfloat16")
        assert all(time > 0 for time in known.values())


# -- what is written ------------------------------------------------------------------------------


def traced(function: Callable[..., Any], *inputs: Tensor, symbolic: bool = False) -> fx.GraphModule:
    mode = "symbolic" if symbolic else "fake"
    return make_fx(function, tracing_mode=mode)(*inputs)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


X, W, B, A = random(256, 64), random(64, 64), random(64, 8), random(8, 64)
STACK = random(4, 64, 64)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "function, inputs",
    (
        (lambda x, w: x @ w.mT, (X, W)),
        (lambda x, w: torch.addmm(w[0], x, w.mT), (X, W)),
        (lambda w, b, a: torch.addmm(w, b, a, alpha=0.5, beta=2.0), (W, random(64, 256), X)),
        (lambda s: torch.bmm(s, s.mT), (STACK,)),
        (lambda s: torch.baddbmm(s, s, s, alpha=3.0), (STACK,)),
    ),
    ids=("mm", "addmm of a bias", "addmm", "bmm", "baddbmm"),
)
def test_values_are_rounded_once(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype
) -> None:
    given = [x.to(dtype) for x in inputs]
    gm = traced(function, *given)
    assert upcast(gm.graph, profiles) == 1
    gm.graph.lint()
    gm.recompile()
    (product,) = (
        n
        for n in gm.graph.nodes
        if n.target in (aten.mm.default, aten.bmm.default)
        or n.target in (aten.addmm.default, aten.baddbmm.default)
    )
    assert product.meta["val"].dtype == torch.float32
    made, wanted = gm(*given), function(*(x.double() for x in given))
    assert made.dtype == dtype
    # A result is as close as rounding it once allows, and what float32 adds up.
    allowed = wanted.abs() * torch.finfo(dtype).eps / 2 + 1e-4
    assert ((made.double() - wanted).abs() <= allowed).all()


def test_an_operand_is_cast_once() -> None:
    gm = traced(lambda x, v, w: (x @ v.mT, x @ w.mT), X, W, W + 1)
    assert upcast(gm.graph, profiles) == 2
    wide = [n for n in gm.graph.nodes if n.target == CAST and n.args[1] == torch.float32]
    assert len(wide) == 3


def test_an_operand_that_is_overwritten_is_cast_again() -> None:
    graph = fx.Graph()  # built by hand, because AOTAutograd writes where a graph ends
    x, w = graph.placeholder("x"), graph.placeholder("w")
    first = graph.call_function(aten.mm.default, (x, w))
    written = graph.call_function(aten.mul_.Scalar, (x, 2.0))
    second = graph.call_function(aten.mm.default, (x, w))
    graph.output((first, second))
    for node, val in ((x, X), (w, W), (first, X @ W), (written, X), (second, X @ W)):
        node.meta["val"] = val
    gm = fx.GraphModule(nn.Module(), graph)
    assert upcast(graph, profiles) == 2
    gm.recompile()
    one, two = gm(X.clone(), W)
    torch.testing.assert_close(two, 2 * one)


def test_other_products_stay() -> None:
    cases = (
        (lambda x, w: x @ w.mT, (X.float(), W.float())),  # float32
        (lambda x, w: x @ w.mT, (X[:1], W)),  # a vector
        (lambda x, w: (x @ w.mT).relu(), (X.long(), W.long())),
    )
    for function, inputs in cases:
        gm = traced(function, *inputs)
        before = str(gm.graph)
        assert upcast(gm.graph, profiles) == 0
        assert str(gm.graph) == before


def test_symbolic_sizes_are_those_of_the_trace() -> None:
    gm = traced(lambda x, w: x @ w.mT, X, W, symbolic=True)
    assert upcast(gm.graph, profiles) == 1
    gm.recompile()
    for tokens in (256, 7):
        x = random(tokens, 64)
        torch.testing.assert_close(gm(x, W), (x.float() @ W.float().mT).bfloat16())


# -- compiled models ------------------------------------------------------------------------------


@pytest.fixture
def slow_cpu(no_profile: Path) -> None:
    """A machine that was measured to be slow in bfloat16."""
    store.add(key_of(CPU, "bfloat16"), Record(SLOW))
    torch._dynamo.reset()


class Block(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(x)))


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, target_modules=["up", "down"], init_lora_weights=False)
    model: nn.Module = get_peft_model(Block(), config, autocast_adapter_dtype=False)
    return model.bfloat16()


def step(model: nn.Module, run: Callable[..., Any]) -> list[Tensor]:
    dtype = next(model.parameters()).dtype
    x = random(TOKENS, WIDTH).to(dtype).requires_grad_()
    y = run(x)
    y.backward(random(TOKENS, WIDTH).to(dtype))
    found = [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return [t for t in found if t is not None]


def kept_and_report(model: nn.Module, **options: object) -> tuple[int, runlora_fx.Report]:
    """What a compiled step keeps [B], and its report; its values are those in float64."""
    wanted = step(model.double(), model)
    model.bfloat16()
    torch._dynamo.reset()
    run = torch.compile(model, backend="runlora", options=ours(**options))
    found = step(model, run)
    for made, want in zip(found, wanted, strict=True):
        assert ((made.double() - want).norm() / want.norm()) < 0.02
    x = random(TOKENS, WIDTH).requires_grad_()
    report = runlora_fx.report_of(run)
    assert report is not None
    return saved_bytes(lambda: run(x), [x, *model.parameters()]), report


@pytest.mark.usefixtures("slow_cpu")
def test_a_compiled_model_runs_them() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    config = LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    _, report = kept_and_report(model)
    assert report.upcast > 0
    assert "of 16-bit matrices run in float32" in str(report)


@pytest.mark.slow
@pytest.mark.usefixtures("slow_cpu")
def test_a_compiled_model_keeps_no_more() -> None:
    kept, report = kept_and_report(adapted())
    as_they_are, other = kept_and_report(adapted(), upcast=False)
    assert report.upcast > 0 == other.upcast
    assert "run in float32" not in str(other)
    assert kept <= as_they_are


def test_a_graph_without_adapters_stays(slow_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_pass, "upcast", lambda *_: pytest.fail("looked at the graph"))
    run = torch.compile(Block().bfloat16(), backend="runlora")
    with torch.no_grad():
        assert run(X).dtype == torch.bfloat16


def late(strict: bool) -> tuple[late_pass.LatePass, fx.GraphModule]:
    options = Options(strict=strict)
    machine = late_pass.machine_of(options)
    joint = late_pass.RunloraPass(options, machine=machine)
    joint.found = True
    return late_pass.LatePass(joint, machine, strict=strict), traced(lambda x, w: x @ w.mT, X, W)


def test_a_failure_leaves_the_graph(
    slow_cpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(graph: fx.Graph, _: object) -> int:
        upcast(graph, profiles)
        raise RuntimeError("broken")

    monkeypatch.setattr(late_pass, "upcast", fails)
    run, gm = late(strict=False)
    before = str(gm.graph)
    with caplog.at_level(logging.WARNING, "runlora_fx"):
        run(gm.graph)
    assert str(gm.graph) == before and run.upcasts == 0
    assert "RuntimeError: broken" in caplog.text
    strict, gm = late(strict=True)
    with pytest.raises(RuntimeError, match="broken"):
        strict(gm.graph)
    assert str(gm.graph) == before
