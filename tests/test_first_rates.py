"""Rates that are measured once, when adapters are first compiled on a machine without a profile."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import RUNLORA_EAGER
from peft import LoraConfig, get_peft_model
from processes import python
from torch import Tensor, fx, nn

import runlora_fx
from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices import machine
from runlora_fx.cost_model.devices.machine import Machine, key_of
from runlora_fx.passes.tune import first_rates
from runlora_fx.passes.tune.first_rates import bottlenecks

CPU = torch.device("cpu")
RATES = {"flops.nn": 1e-11, "flops.nt": 2e-11, "flops.tn": 3e-11, "launches": 1e-6}


@pytest.fixture(autouse=True)
def _first_time(no_profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has measured nothing, on a machine of which nothing is stored."""
    monkeypatch.setattr(first_rates, "_done", set())
    monkeypatch.setattr(machine, "_used", {})
    monkeypatch.delenv("CI", raising=False)
    torch._dynamo.reset()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dtypes for which rates are measured; the numbers are given."""
    found: list[str] = []

    def rates(device: torch.device, dtype: str, budget_s: float) -> dict[str, float]:
        found.append(dtype)
        return RATES

    monkeypatch.setattr(first_rates, "rates", rates)
    return found


def adapted(**settings: Any) -> nn.Module:
    base = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    model: nn.Module = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"], **settings))
    return model


def step(model: nn.Module, backend: str = RUNLORA_EAGER, **options: object) -> None:
    given = {f"runlora.{name}": value for name, value in options.items()}
    run = torch.compile(model, backend=backend, options=given or None)
    run(torch.randn(32, 64)).sum().backward()


def test_the_first_compilation_measures_and_stores(no_profile: Path) -> None:
    """Really: all rates of products, none of pointwise kernels, which Inductor would compile."""
    step(adapted())
    known = store.load(key_of(CPU, "float32")).seconds_per
    if not known:
        pytest.skip("the machine is too busy to measure")
    assert {"flops.nn", "flops.nt", "flops.tn"} <= set(known)
    assert not {"special", "random"} & set(known)
    assert [path.suffix for path in no_profile.iterdir() if path.suffix != ".lock"] == [".json"]


def test_nothing_is_measured_twice(measured: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "runlora_fx")
    step(adapted())
    step(adapted())
    assert measured == ["float32"]
    said = [r.message for r in caplog.records if "measured the rates of float32" in r.message]
    assert len(said) == 1 and "once" in said[0]
    assert Machine(use_stored=True).profile(CPU, "float32").seconds_per["flops.nt"] == 2e-11


def test_plans_and_keys_use_what_is_measured(measured: list[str]) -> None:
    before = Machine(use_stored=True).identity()
    step(adapted())
    report = runlora_fx.last_report()
    assert report is not None and len(report.sites) == 2
    assert Machine(use_stored=True).identity() != before


@pytest.mark.parametrize(
    "options", ({"tune": "off"}, {"objective": "flops"}, {"device": "h100"}), ids=str
)
def test_options_forbid_it(measured: list[str], options: dict[str, object]) -> None:
    step(adapted(), **options)
    assert measured == []


def test_services_that_test_measure_nothing(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    step(adapted())
    assert measured == []


def test_a_calibrated_machine_measures_nothing(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(key_of(CPU, "float32"), store.Record({"flops.nn": 1e-12}))
    step(adapted())
    assert measured == []
    assert store.load(key_of(CPU, "float32")).seconds_per == {"flops.nn": 1e-12}


def test_a_folder_that_cannot_be_written_does_no_harm(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv(store.FOLDER_VARIABLE, str(tmp_path / "a file"))
    step(adapted())
    step(adapted())
    assert measured == ["float32"]
    assert Machine(use_stored=True).profile(CPU, "float32").seconds_per["flops.nt"] == 2e-11


@pytest.mark.parametrize("fault", ("raises", "too busy"))
def test_without_rates_the_model_still_compiles(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def rates(*_: object) -> None:
        if fault == "raises":
            raise RuntimeError("no memory")

    monkeypatch.setattr(first_rates, "rates", rates)
    step(adapted())
    step(adapted())
    said = [r.message for r in caplog.records if "could not measure" in r.message]
    assert len(said) == 1
    report = runlora_fx.last_report()
    assert report is not None and len(report.sites) == 2


# --- which graphs


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(self.up(x).relu())
        return made


class Merged(nn.Module):
    """Multiplies the factors first."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 32))
        self.a, self.b = nn.Parameter(torch.randn(4, 32)), nn.Parameter(torch.randn(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.w + 2 * self.b @ self.a).t()


def graph_of(model: nn.Module, x: Tensor) -> fx.Graph:
    found: list[fx.Graph] = []

    def keep(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append(gm.graph)
        return gm.forward

    torch.compile(model, backend=keep)(x)
    return found[0]


@pytest.mark.parametrize(
    ("model", "count"),
    (
        (adapted, 2),
        (lambda: adapted(lora_dropout=0.1), 2),
        (lambda: adapted(use_rslora=True), 2),
        (Merged, 1),
        (Plain, 0),
        (lambda: nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 0),
    ),
    ids=("LoRA", "dropout", "rsLoRA", "merged", "widens first", "attention"),
)
def test_adapters_are_recognised(model: Callable[[], nn.Module], count: int) -> None:
    width = {Plain: 16, Merged: 32}.get(model, 64)  # type: ignore[call-overload]
    graph = graph_of(model(), torch.randn(2, 128, width))
    assert list(bottlenecks(graph)) == [(CPU, "float32")] * count


def test_half_precision_has_rates_of_its_own(measured: list[str]) -> None:
    model = adapted().to(torch.bfloat16)
    run = torch.compile(model, backend=RUNLORA_EAGER)
    run(torch.randn(32, 64, dtype=torch.bfloat16)).sum().backward()
    assert measured == ["bfloat16"]


# --- several processes

RANK = """
import json, os, sys
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.environ["RUNLORA_CACHE_DIR"] = f"{folder}/{rank}"  # as on two machines
os.environ.pop("CI", None)
import torch
import torch.distributed as dist
from torch import nn
import runlora_fx
from runlora_fx.passes.tune import first_rates
from runlora_fx.cost_model.devices.machine import Machine
# Measurements that differ, as real ones do.
first_rates.rates = lambda device, dtype, s: {"flops.nn": 1e-11 * (rank + 1)}
dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.a, self.b = (nn.Linear(*s, bias=False) for s in ((64, 64), (64, 4), (4, 64)))
    def forward(self, x):
        return self.w(x) + self.b(self.a(x))
torch.compile(Lora(), backend="runlora_eager")(torch.randn(32, 64)).sum().backward()
print("RESULT", Machine(use_stored=True).profile(torch.device("cpu"), "float32").known["flops.nn"])
dist.destroy_process_group()
"""


def test_all_ranks_use_the_same_rates(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda rank: python("-c", RANK, str(rank), "2", str(tmp_path)), range(2))
    done = list(runs)
    assert [run.returncode for run in done] == [0, 0], [run.stderr[-2000:] for run in done]
    found = [run.stdout.split("RESULT ")[1].split()[0] for run in done]
    assert found[0] == found[1]
    assert found[0] in ("1e-11", "2e-11")
