"""Measuring while compiling: what is measured, what it decides, and what it leaves untouched.

No test looks at how long something took. Where a test says how fast plans are, it says so by the
FLOPs that they really run, counted while the compiled trial runs.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from checks import (
    RUNLORA,
    RUNLORA_EAGER,
    assert_same_outputs_and_grads,
    assert_same_values,
    ours,
    outputs_and_grads,
    scalar_kernels,
)
from market import FFN, HIDDEN, randomise_lora_b
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import runlora_fx
from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices import cpu, measure, registry
from runlora_fx.cost_model.devices.machine import Machine, key_of
from runlora_fx.cost_model.ops import GemmShape
from runlora_fx.options import Options
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.pipeline import rewrite_graph
from runlora_fx.passes.tune import pricing
from runlora_fx.passes.tune import trials as trial

pytestmark = pytest.mark.usefixtures("no_profile")

RTOL = 1e-5
RANK = 4
# Scalar kernels, compiled with g++ -O0.
QUICK = {"fx_graph_cache": False, "cpp.simdlen": 1, "aot_inductor.debug_compile": True}
CPU = torch.device("cpu")
MERGING = GemmShape(1, FFN, RANK, HIDDEN).canonical  # B A


def model_of(dropout: float = 0.0) -> PeftModel:
    """One adapted linear layer, HIDDEN -> FFN, and a GELU."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(HIDDEN, FFN, bias=False), nn.GELU())
    config = LoraConfig(r=RANK, lora_alpha=8, lora_dropout=dropout, target_modules=["0"])
    model = get_peft_model(layers, config)
    randomise_lora_b(model)
    return model.train()


def activation(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, HIDDEN, generator=generator, requires_grad=True)


MANY, FEW = 256, 7  # tokens: with the first it saves FLOPs to merge, with the second it does not


def compile_tuned(model: nn.Module, tune: str, backend: str = RUNLORA_EAGER) -> nn.Module:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, options=ours(tune=tune))
    assert isinstance(compiled, nn.Module)
    return compiled


def report() -> runlora_fx.Report:
    last = runlora_fx.last_report()
    assert last is not None
    return last


def reason() -> str:
    (site,) = report().sites
    return site.reason


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[GemmShape]:
    """Lists every product that is measured, and has it measured."""
    calls: list[GemmShape] = []

    def spy(shape: GemmShape, dtype: torch.dtype, device: torch.device) -> float:
        calls.append(shape)
        return measure.matmul_seconds(shape, dtype, device)

    monkeypatch.setattr(pricing, "matmul_seconds", spy)
    return calls


@pytest.fixture
def without_graph_caches() -> Iterator[None]:
    with (
        inductor_config.patch(QUICK),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield


# --- "shapes"


def test_each_product_is_measured_in_one_compilation_and_stored(
    measured: list[GemmShape],
) -> None:
    model = model_of()
    compiled = compile_tuned(model, "shapes")
    assert_same_outputs_and_grads(model, compiled, [activation(MANY)], RTOL)
    # In rounds; both orders of the forward are among what could be the best.
    rounds = set(Counter(measured).values())
    assert len(rounds) == 1
    base = GemmShape(1, MANY, HIDDEN, FFN, False, True).canonical
    down = GemmShape(1, MANY, HIDDEN, RANK, False, True).canonical
    assert {MERGING, base, down} <= set(measured)
    stored = store.load(key_of(CPU, "float32"))
    assert stored.products.keys() == set(measured)
    assert not stored.seconds_per
    assert not stored.plans

    first = set(measured)
    measured.clear()
    assert_same_outputs_and_grads(model, compile_tuned(model, "shapes"), [activation(MANY)], RTOL)
    assert not measured
    assert store.load(key_of(CPU, "float32")) == stored

    # With other tokens only what is new: not B A.
    compile_tuned(model, "shapes")(activation(FEW))
    assert measured
    assert not first & set(measured)
    assert store.load(key_of(CPU, "float32")).products.keys() == first | set(measured)


@pytest.mark.parametrize("tune", ("off", "profile"))
def test_nothing_is_measured_unless_asked_for(
    tune: str, measured: list[GemmShape], no_profile: Path
) -> None:
    compile_tuned(model_of(), tune)(activation(MANY))
    assert report().sites
    assert not measured
    assert not list(no_profile.iterdir())


@pytest.mark.parametrize("tune", ("shapes", "plans"))
def test_counting_flops_measures_nothing(
    tune: str, measured: list[GemmShape], no_profile: Path
) -> None:
    torch._dynamo.reset()
    options = ours(tune=tune, objective="flops")
    torch.compile(model_of(), backend=RUNLORA_EAGER, options=options)(activation(MANY))
    assert "measured" not in reason()
    assert not measured
    assert not list(no_profile.iterdir())


def test_plans_follow_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same shapes merged or not, as the product B A is said to be slow or fast."""
    for seconds, changed in ((1e3, False), (1e-12, True)):
        monkeypatch.setenv(store.FOLDER_VARIABLE, str(store.folder() / str(changed)))
        monkeypatch.setattr(
            pricing,
            "matmul_seconds",
            lambda shape, *_, slow=seconds: slow if shape == MERGING else 1e-3,
        )
        model = model_of()
        compiled = compile_tuned(model, "shapes")
        assert_same_outputs_and_grads(model, compiled, [activation(MANY)], RTOL)
        merges = report().sites[0].after.startswith("M = W + 2 B A")
        assert merges == changed, report().sites[0].after


@pytest.mark.parametrize("error", (torch.OutOfMemoryError, RuntimeError, NotImplementedError))
def test_a_product_that_cannot_be_measured_is_predicted(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, measured: list[GemmShape]
) -> None:
    spied = pricing.matmul_seconds

    def fails(shape: GemmShape, dtype: torch.dtype, device: torch.device) -> float:
        if shape != MERGING:
            return spied(shape, dtype, device)
        measured.append(shape)
        raise error("not enough memory")

    monkeypatch.setattr(pricing, "matmul_seconds", fails)
    model = model_of()
    compiled = compile_tuned(model, "shapes")
    assert_same_outputs_and_grads(model, compiled, [activation(MANY)], RTOL)
    assert measured.count(MERGING) == 1  # not again in the next round
    stored = store.load(key_of(CPU, "float32")).products
    assert stored.keys() == set(measured) - {MERGING}


def test_compiles_where_nothing_can_be_stored(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: list[GemmShape],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv(store.FOLDER_VARIABLE, str(tmp_path / "a file"))
    model = model_of()
    compiled = compile_tuned(model, "shapes")
    assert_same_outputs_and_grads(model, compiled, [activation(MANY)], RTOL)
    assert measured
    warned = [r.getMessage() for r in caplog.records if r.name == "runlora_fx"]
    assert len([text for text in warned if "cannot keep its measurements" in text]) == 1


# --- what measuring leaves as it was


@pytest.mark.usefixtures("without_graph_caches")
@pytest.mark.parametrize(
    ("tune", "backend"),
    (("shapes", RUNLORA_EAGER), ("plans", RUNLORA)),
)
def test_random_numbers_are_those_of_a_step_without_measuring(
    tune: str, backend: str, measured: list[GemmShape]
) -> None:
    model, x = model_of(dropout=0.25), activation(MANY)
    seen = {}
    for name in ("off", tune):
        compiled = compile_tuned(model, name, backend)
        assert not measured
        torch.manual_seed(5)
        values = outputs_and_grads(compiled, [x])
        seen[name] = values, torch.get_rng_state(), torch.rand(3)
    assert measured
    assert not report().from_cache
    (wanted, state, following), (found, found_state, found_following) = seen.values()
    assert torch.equal(state, found_state)
    assert torch.equal(following, found_following)
    assert_same_values(found, wanted, RTOL)  # another mask would be another quarter of x


@pytest.fixture
def three_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def settings() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
    )


def test_settings_are_as_they_were_and_measurements_are_made_without_them(
    three_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: set[tuple[object, ...]] = set()

    real = measure.seconds

    def spy(run: Callable[[], object], device: torch.device, repeats: int = 2) -> float:
        inside.add(settings())
        return real(run, device, repeats)

    monkeypatch.setattr(measure, "seconds", spy)
    model, x = model_of(), activation(MANY)
    with torch.autocast("cpu", torch.bfloat16):
        before = settings()
        wanted = model(x)
        y = compile_tuned(model, "shapes")(x)
        assert settings() == before
    assert y.dtype == wanted.dtype == torch.bfloat16
    y.sum().backward()
    with torch.no_grad():
        before = settings()
        compile_tuned(model, "shapes")(activation(FEW))
        assert settings() == before
    # Products are measured as a library sees them: no autocast, no gradients, the user's threads.
    assert {(grad, autocast, threads) for grad, _, autocast, _, _, threads, *_ in inside} == {
        (False, False, three_threads)
    }
    for dtype in ("bfloat16", "float32"):
        assert store.load(key_of(CPU, dtype)).products


# --- "plans"


def by_flops(shape: GemmShape, *_: object) -> float:
    """The time of a product on a machine that computes a TFLOP a second [s]."""
    return 2e-12 * shape.b * shape.m * shape.k * shape.n


class Clock:
    """Times plans by the FLOPs that they run.

    Attributes:
        flops: Of every run that was timed, in order.
    """

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.flops: list[int] = []
        self._seconds = seconds

    def __call__(self, run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        self.flops.append(counter.get_total_flops())
        return self._seconds(self.flops[-1])

    def plans(self) -> list[int]:
        """The FLOPs of each plan's forward and backward."""
        pairs = list(zip(self.flops[::2], self.flops[1::2], strict=True))
        return [forward + backward for forward, backward in pairs[: len(pairs) // trial._ROUNDS]]


@pytest.mark.usefixtures("without_graph_caches")
@pytest.mark.parametrize(
    ("fastest", "tokens", "backend"),
    (
        (min, MANY, RUNLORA),
        (max, MANY, RUNLORA_EAGER),
        (min, FEW, RUNLORA_EAGER),
        (max, FEW, RUNLORA_EAGER),
    ),
    ids=("fewest of many", "most of many", "fewest of few", "most of few"),
)
def test_the_plan_that_ran_fastest_is_emitted(
    fastest: Callable[[list[int]], int],
    tokens: int,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Products are "measured" by their FLOPs, too: their times decide which plans are timed.
    monkeypatch.setattr(pricing, "matmul_seconds", by_flops)
    limit = 6 * tokens * HIDDEN * FFN  # more than any forward or backward takes
    clock = Clock(lambda flops: 1e-12 * (flops if fastest is min else limit - flops))
    monkeypatch.setattr(trial, "seconds", clock)
    model, x = model_of(), activation(tokens)
    assert_same_outputs_and_grads(model, compile_tuned(model, "plans", backend), [x], RTOL)

    came, *others = clock.plans()
    assert others
    assert came == report().flops_before
    best = fastest(clock.plans())
    assert report().flops_after == best
    (site,) = report().sites
    assert site.changed == (best != came)
    assert "measured" in site.reason
    if tokens == MANY and fastest is min:
        assert best < came
    if tokens == FEW and fastest is max:
        assert best > came  # the clock is obeyed against all that is predicted

    # Known from now on, to another compilation as to another process.
    (times,) = store.load(key_of(CPU, "float32")).plans.values()
    assert len(times) == len(clock.plans())
    said, count = report(), len(clock.flops)
    assert_same_outputs_and_grads(model, compile_tuned(model, "plans", backend), [x], RTOL)
    assert len(clock.flops) == count
    assert report() == said


@pytest.mark.usefixtures("without_graph_caches")
def test_a_tie_leaves_the_graph_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "seconds", lambda run, device, repeats=1: 1e-3)
    model = model_of()
    compiled = compile_tuned(model, "plans")
    assert_same_outputs_and_grads(model, compiled, [activation(MANY)], RTOL)
    assert reason().startswith("left alone: no plan was measured to be faster")
    assert [cause.name for cause in report().sites[0].causes] == ["measured"]
    assert report().flops_after == report().flops_before


@pytest.mark.usefixtures("without_graph_caches")
@pytest.mark.parametrize("where", ("seconds", "compile_graph", "partitioned"))
def test_a_trial_that_fails_keeps_the_decision(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = model_of(), activation(MANY)
    compile_tuned(model, "shapes")(x)
    wanted = report()
    assert any(site.changed for site in wanted.sites)

    def fails(*_: object, **__: object) -> float:
        raise torch.OutOfMemoryError("not enough memory")

    monkeypatch.setattr(trial, where, fails)
    assert_same_outputs_and_grads(model, compile_tuned(model, "plans"), [x], RTOL)
    assert report() == wanted
    assert not store.load(key_of(CPU, "float32")).plans
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


# --- what a trial is known by


class Scaled(nn.Module):
    """An adapted layer, and an elementwise product with a tensor that is no leaf of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = model_of()

    def forward(self, x: Tensor, by: Tensor) -> Tensor:
        scaled: Tensor = self.layer(x) * by
        return scaled


SIDE_INPUTS = {
    "as large": lambda: torch.randn(MANY, FFN),
    "transposed": lambda: torch.randn(FFN, MANY).t(),
    "repeated": lambda: torch.randn(1, FFN).expand(MANY, FFN),
    "a row": lambda: torch.randn(1, FFN),
    "whole numbers": lambda: torch.ones(MANY, FFN, dtype=torch.int64),
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Have plans of fewer FLOPs run faster."""
    clock = Clock(lambda flops: 1e-12 * flops)
    monkeypatch.setattr(trial, "seconds", clock)
    return clock


@pytest.mark.usefixtures("without_graph_caches")
def test_times_hold_for_the_layouts_of_all_inputs_that_they_were_taken_with(clock: Clock) -> None:
    with torch.no_grad():
        for count, by in enumerate(SIDE_INPUTS.values(), 1):
            compile_tuned(Scaled(), "plans")(activation(MANY), by())
            assert "measured" in reason()
            assert len(store.load(key_of(CPU, "float32")).plans) == count
        taken = len(clock.flops)
        for by in SIDE_INPUTS.values():
            compile_tuned(Scaled(), "plans")(activation(MANY), by())
    assert len(clock.flops) == taken


@pytest.mark.usefixtures("without_graph_caches")
def test_equal_layers_are_tried_once(clock: Clock) -> None:
    layers = [nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4)]
    model = nn.Sequential(*(nn.Sequential(layer, nn.GELU()) for layer in layers))
    names = [f"{i}.0" for i in range(len(layers))]
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=names)).eval()
    with torch.no_grad():
        compile_tuned(model, "plans")(activation(MANY))
    # The first has no GELU in front of it.
    assert len(report().sites) == len(layers)
    assert len(store.load(key_of(CPU, "float32")).plans) == 2


@pytest.mark.usefixtures("without_graph_caches")
def test_trials_are_compiled_with_the_settings_of_the_graph_and_known_by_them(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = trial.compile_graph, []

    def spy(gm: fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        seen.append(inductor_config.max_fusion_size)
        return real(gm, inputs)

    monkeypatch.setattr(trial, "compile_graph", spy)
    with torch.no_grad():
        for size in (33, 34, 33):
            with inductor_config.patch(max_fusion_size=size):
                compile_tuned(model_of(), "plans")(activation(MANY))
    assert list(dict.fromkeys(seen)) == [33, 34]
    assert seen == sorted(seen)  # nothing is tried again
    assert len(store.load(key_of(CPU, "float32")).plans) == 2


@pytest.mark.usefixtures("without_graph_caches")
def test_trials_are_known_by_the_settings_of_every_dtype(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A region in bf16 may hold products in fp32, behind casts."""
    model, x = model_of().to(torch.bfloat16), activation(MANY).to(torch.bfloat16)
    with torch.no_grad():
        for precision in ("highest", "medium", "highest"):
            monkeypatch.setattr(cpu, "fp32_precision", lambda _, found=precision: found)
            compile_tuned(model, "plans")(x)
    assert len(store.load(key_of(CPU, "bfloat16")).plans) == 2


# --- devices that are not here


@pytest.mark.parametrize("device", ("cuda", "xpu", "mps"))
@pytest.mark.parametrize("tune", ("off", "shapes", "plans"))
def test_a_graph_for_a_device_that_is_not_here_is_planned_without_measuring(
    device: str, tune: str, no_profile: Path
) -> None:
    """Graphs are traced for other machines with fake tensors."""
    if device in {here.type for here in registry.present()}:
        pytest.skip("has the device")
    graph = fx.Graph()
    with FakeTensorMode():
        sizes = {"x": (MANY, HIDDEN), "w": (HIDDEN, FFN), "a": (HIDDEN, RANK), "b": (RANK, FFN)}
        nodes = {}
        for name, size in sizes.items():
            nodes[name] = graph.placeholder(name)
            nodes[name].meta["val"] = torch.empty(size, device=device)

        def call(target: Callable[..., Tensor], *args: fx.Node) -> fx.Node:
            node = graph.call_function(target, args)
            node.meta["val"] = target(*(arg.meta["val"] for arg in args))
            return node

        mm = torch.ops.aten.mm.default
        low = call(mm, call(mm, nodes["x"], nodes["a"]), nodes["b"])
        result = call(torch.ops.aten.add.Tensor, call(mm, nodes["x"], nodes["w"]), low)
    graph.output((result,))
    options = Options(tune=tune, strict=True)  # type: ignore[arg-type]
    found = rewrite_graph(graph, ATEN, options, Machine(use_stored=True))
    assert found.flops_after < found.flops_before
    assert not list(no_profile.iterdir())


# --- processes

SCRIPT = """
import json, sys
import torch
from torch import nn
import torch.distributed as dist
import runlora_fx
from runlora_fx.passes.tune import pricing, trials as trial

tune, rank, world, rendezvous = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
calls = {"products": 0, "plans": 0}

def counting(module, name, kind):
    real = getattr(module, name)
    def call(*args, **kwargs):
        calls[kind] += 1
        return real(*args, **kwargs)
    setattr(module, name, call)

counting(pricing, "matmul_seconds", "products")
counting(trial, "seconds", "plans")

class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(16, 24, bias=False).requires_grad_(False)
        self.lora_A = nn.Linear(16, 2, bias=False)
        self.lora_B = nn.Linear(2, 24, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

if world:
    dist.init_process_group("gloo", init_method="file://" + rendezvous, rank=rank, world_size=world)
torch.manual_seed(0)
model = Adapted()
for tokens in (64, 96)[: max(world, 1)]:
    torch._dynamo.reset()
    options = {"runlora.tune": tune, "runlora.strict": True}
    torch.compile(model, backend="runlora_eager", options=options)(torch.randn(tokens, 16)).sum()
report = runlora_fx.last_report()
print(json.dumps({**calls, "sites": len(report.sites), "reason": report.sites[0].reason}))
if world:
    dist.destroy_process_group()
"""


def started(
    folder: Path, tune: str, rank: int = 0, world: int = 0, seed: int = 0
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tune, str(rank), str(world), str(folder / "meeting")],
        env={
            **os.environ,
            store.FOLDER_VARIABLE: str(folder / "profiles"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "PYTHONHASHSEED": str(seed),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: "subprocess.Popen[str]") -> tuple[dict[str, object], str]:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1]), errors


def test_another_process_measures_nothing_again(no_profile: Path) -> None:
    # A group of one need not agree with anybody.
    first, errors = finished(started(no_profile, "plans", world=1, seed=1))
    assert first["products"]
    assert first["plans"]
    assert "measures nothing" not in errors
    second, _ = finished(started(no_profile, "plans", seed=2))
    assert second == {**first, "products": 0, "plans": 0}
    assert "measured" in str(second["reason"])


def test_ranks_of_a_group_measure_nothing_and_say_so(no_profile: Path) -> None:
    ranks = [started(no_profile, "plans", rank, world=2) for rank in range(2)]
    for outcome, errors in map(finished, ranks):
        assert outcome["products"] == outcome["plans"] == 0
        assert outcome["sites"] == 1
        # Once, although there were two graphs.
        assert errors.count("runlora measures nothing in a process group") == 1
    assert not (no_profile / "profiles").exists()


# --- Inductor's caches


@scalar_kernels
def test_measuring_costs_the_caches_one_more_miss(measured: list[GemmShape]) -> None:
    model, x = model_of(), activation(MANY)
    hits = []
    with fresh_cache(), inductor_config.patch(fx_graph_cache=True):
        for _ in range(3):
            measured.clear()
            counters.clear()
            compiled = compile_tuned(model, "shapes", RUNLORA)
            assert_same_outputs_and_grads(model, compiled, [x], RTOL)
            hits.append((bool(measured), report().from_cache))
    # The first measures, which changes what the second depends on; the third finds the second's.
    assert hits == [(True, False), (False, False), (False, True)]
