"""Inductor's graph caches across processes: what is served from them, and what must not be.

Two processes share one fresh cache folder and run the same script: a list of compilations, each of
a training step of a small LoRA model, after which each says what the caches counted. All forwards
and backwards consist of matrix products, for which Inductor has no kernel to compile.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from conftest import FLOPS_BOUND
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from runlora_fx import Options, RunloraPass
from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices.machine import DTYPES, key_of
from runlora_fx.cost_model.ops import GemmShape
from runlora_fx.cost_model.store import Record

SCRIPT = """
import json, os, sys
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(16, 24, bias=False).requires_grad_(False)
        self.lora_A = nn.Linear(16, 2, bias=False)
        self.lora_B = nn.Linear(2, 24, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

class UsersPass(CustomGraphPass):
    def __call__(self, graph): pass
    def uuid(self): return "the user's"

# By name of the folder: of the number that is stored there in each process.
BOUND_BY_FLOPS = {
    **dict.fromkeys(("flops.nn", "flops.nt", "flops.tn"), 1e-12),
    **dict.fromkeys(("read", "written", "elementwise", "launches"), 1e-25),
}
BOUND_BY_LAUNCHES = {
    **BOUND_BY_FLOPS,
    **dict.fromkeys(("flops.nn", "flops.nt", "flops.tn"), 1e-25), "launches": 1.0,
}

@contextmanager
def measured(name, rates):
    from runlora_fx.cost_model import store
    from runlora_fx.cost_model.devices.machine import key_of
    with patch.dict(os.environ, {store.FOLDER_VARIABLE: os.path.abspath(name)}):
        store.add(key_of(torch.device("cpu"), "float32"), store.Record(rates))
        yield

def plugged_in():
    import runlora_fx
    return config.patch(joint_custom_pre_pass=runlora_fx.RunloraPass())

@contextmanager
def both(one, other):
    with one, other:
        yield

def symbolic():
    return torch._dynamo.config.patch(assume_static_by_default=False)

SETTINGS = {
    "plugged in": plugged_in,
    "symbolic": symbolic,
    "plugged in, symbolic": lambda: both(plugged_in(), symbolic()),
    "same numbers": lambda: measured("same", BOUND_BY_LAUNCHES),
    "numbers": lambda: measured("numbers", BOUND_BY_FLOPS),
    "other numbers": lambda: measured("numbers", BOUND_BY_LAUNCHES),
    "a user's pass": lambda: config.patch(joint_custom_pre_pass=UsersPass()),
    "a user's function": lambda: config.patch(joint_custom_pre_pass=lambda graph: None),
    "another version": lambda: patch("runlora_fx.joint_pass.__version__", "0.0.0"),
    "another source": lambda: patch("runlora_fx.joint_pass._source_hash", lambda: b"another"),
    "": nullcontext,
}

torch.manual_seed(0)
model = Adapted()
inputs = {tokens: torch.randn(tokens, 16) for tokens in (64, 80, 96, 112)}
tangents = {tokens: torch.randn(tokens, 24) for tokens in inputs}
for tokens, backend, margin, setting in json.loads(sys.argv[1]):
    torch._dynamo.reset()
    counters.clear()
    model.zero_grad()
    options = None if margin is None else {"runlora.margin": margin}
    imported = "runlora_fx" in sys.modules
    with SETTINGS[setting]():
        compiled = torch.compile(model, backend=backend, options=options, fullgraph=True)
        y = compiled(inputs[tokens])
        y.backward(tangents[tokens])
    import runlora_fx
    report = runlora_fx.last_report()
    values = [y, model.lora_A.weight.grad, model.lora_B.weight.grad]
    cached = {**counters["inductor"], **counters["aot_autograd"]}
    print("RESULT", json.dumps({
        "imported": imported,
        "counts": {name: n for name, n in cached.items() if "cache_" in name},
        "from_cache": report is not None and report.from_cache,
        "changed": report is not None and any(site.changed for site in report.sites),
        "report": str(report),
        "json": report.to_json(),
        "values": [value.double().norm().item() for value in values],
    }))
"""


@dataclass(frozen=True)
class Compilation:
    """One compilation of the script: tokens of the batch, backend, `runlora.margin`, setting."""

    tokens: int = 64
    backend: str = "runlora"
    margin: float | None = None
    setting: str = ""


@dataclass(frozen=True)
class Outcome:
    """What the script says of a compilation.

    Attributes:
        imported: Whether runlora_fx was imported before.
        counts: What Inductor and AOTAutograd counted, by name.
        from_cache: What `last_report()` says.
        changed: Whether a site was, by `last_report()`.
        report: The report as text.
        json: The report as JSON.
        values: Norms of the output and of the gradients.
    """

    imported: bool
    counts: Mapping[str, int]
    from_cache: bool
    changed: bool
    report: str
    json: str
    values: list[float]

    @property
    def is_hit(self) -> bool:
        """Whether all came from both caches: one joint graph; a forward and a backward."""
        return self.counts == {"autograd_cache_hit": 1, "fxgraph_cache_hit": 2}

    @property
    def is_miss(self) -> bool:
        """Whether nothing came from a cache, and all went there."""
        misses = {"autograd_cache_miss": 1, "autograd_cache_saved": 1, "fxgraph_cache_miss": 2}
        return self.counts == misses


OURS = Compilation()
# The order matters: with 64 tokens our code comes first, with 96 Inductor's.
FIRST = [
    OURS,
    Compilation(backend="inductor"),
    Compilation(margin=0.5),
    Compilation(setting="another version"),
    Compilation(setting="another source"),
    Compilation(setting="a user's pass"),
    Compilation(setting="a user's function"),
    Compilation(tokens=96, backend="inductor"),
    Compilation(tokens=96),
    Compilation(tokens=80, setting="same numbers"),
    Compilation(tokens=112, setting="numbers"),
    Compilation(backend="inductor", setting="plugged in"),
    Compilation(setting="symbolic"),
    Compilation(backend="inductor", setting="plugged in, symbolic"),
]
SECOND = [
    OURS,
    Compilation(backend="inductor"),
    Compilation(margin=0.5),
    Compilation(margin=0.25),
    Compilation(setting="a user's pass"),
    Compilation(setting="a user's function"),
    Compilation(tokens=96),
    Compilation(tokens=80, setting="same numbers"),
    Compilation(tokens=112, setting="other numbers"),
    Compilation(backend="inductor", setting="plugged in"),
    Compilation(tokens=80, setting="symbolic"),
    Compilation(tokens=80, backend="inductor", setting="plugged in, symbolic"),
]


def _run(compilations: list[Compilation], folder: Path) -> dict[Compilation, Outcome]:
    """Run the script in a process of its own.

    Args:
        compilations: What it compiles.
        folder: Where it runs. Its caches are in a folder below: Python imports from where it runs,
            and folders of Inductor's cache may have names of modules, such as `z3`.
    """
    order = [[getattr(c, field.name) for field in fields(c)] for c in compilations]
    switches = ("TORCHINDUCTOR_", "TORCH_COMPILE_", "TORCH_LOGS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(switches)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(order)],
        env={**environment, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    outcomes = [Outcome(**json.loads(line.removeprefix("RESULT "))) for line in lines]
    return dict(zip(compilations, outcomes, strict=True))


Runs = tuple[dict[Compilation, Outcome], dict[Compilation, Outcome]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The outcomes of two processes, one after the other, that share a new cache."""
    folder = tmp_path_factory.mktemp("caches")
    return _run(FIRST, folder), _run(SECOND, folder)


def test_backend_is_found_by_its_name_alone(runs: Runs) -> None:
    for run in runs:
        assert not run[OURS].imported
        assert run[Compilation(backend="inductor")].imported


def test_first_process_compiles_and_says_what_it_did(runs: Runs) -> None:
    outcome = runs[0][OURS]
    assert outcome.is_miss, outcome.counts
    assert outcome.changed
    assert not outcome.from_cache


def test_second_process_is_served_from_both_caches_and_says_so(runs: Runs) -> None:
    first, second = (run[OURS] for run in runs)
    assert second.is_hit, second.counts
    assert second.from_cache
    assert "came from a cache" in second.report
    assert second.values == first.values


@pytest.mark.parametrize(
    "compilation",
    (
        OURS,
        Compilation(margin=0.5),
        Compilation(tokens=96),
        Compilation(tokens=80, setting="same numbers"),
        Compilation(setting="a user's pass"),
        Compilation(backend="inductor", setting="plugged in"),
    ),
    ids=str,
)
def test_second_process_shows_the_report_of_the_first(compilation: Compilation, runs: Runs) -> None:
    """The same verdict, table and JSON, and what the sites are; marked as from a cache."""
    first, second = (run[compilation] for run in runs)
    assert second.is_hit, second.counts
    assert json.loads(second.json) == {**json.loads(first.json), "from_cache": True}
    assert second.report.splitlines()[0] == first.report.splitlines()[0]
    assert second.changed == first.changed
    tables = [run.report[run.report.index("\nrow ") :] for run in (first, second)]
    assert tables[0] == tables[1]
    assert "came from a cache" not in first.report


@pytest.mark.parametrize(
    "compilation",
    (
        Compilation(setting="symbolic"),
        Compilation(backend="inductor", setting="plugged in, symbolic"),
    ),
    ids=str,
)
def test_code_for_symbolic_sizes_has_its_report_at_other_sizes(
    compilation: Compilation, runs: Runs
) -> None:
    first, second = runs[0][compilation], runs[1][replace(compilation, tokens=80)]
    assert first.is_miss, first.counts
    assert first.changed
    assert second.is_hit, second.counts
    marks = {"from_cache": True, "of_other_sizes": True}
    assert json.loads(second.json) == {**json.loads(first.json), **marks}
    assert second.report.splitlines()[0] == first.report.splitlines()[0]
    assert "It was compiled for other sizes" in second.report


@pytest.mark.parametrize(
    "other",
    (
        Compilation(margin=0.5),
        Compilation(setting="another version"),
        Compilation(setting="another source"),
    ),
    ids=("option", "version", "source"),
)
def test_other_options_and_versions_are_not_served_the_same_code(
    other: Compilation, runs: Runs
) -> None:
    outcome = runs[0][other]
    assert outcome.is_miss, outcome.counts
    assert not outcome.from_cache
    # The margin is more than what there is to save.
    assert outcome.changed == (other.margin is None)


def test_each_option_has_its_own_entry(runs: Runs) -> None:
    _, second = runs
    assert second[Compilation(margin=0.5)].is_hit
    assert second[Compilation(margin=0.25)].is_miss


def test_inductor_is_not_served_our_code_nor_we_inductors(runs: Runs) -> None:
    first, second = runs
    after_us = first[Compilation(backend="inductor")]
    after_inductor = first[Compilation(tokens=96)]
    assert after_us.is_miss, after_us.counts
    assert after_inductor.is_miss, after_inductor.counts
    assert after_inductor.changed
    for again in (Compilation(backend="inductor"), Compilation(tokens=96)):
        assert second[again].is_hit, second[again].counts
        assert second[again].values == first[again].values
    assert after_us.values == pytest.approx(first[OURS].values, rel=1e-5)


def test_users_pass_with_an_identity_is_cached_with_ours(runs: Runs) -> None:
    first, second = (run[Compilation(setting="a user's pass")] for run in runs)
    assert first.is_miss, first.counts
    assert first.changed
    assert second.is_hit, second.counts
    assert second.from_cache


def test_users_pass_without_an_identity_is_never_cached(runs: Runs) -> None:
    for run in runs:
        outcome = run[Compilation(setting="a user's function")]
        assert outcome.counts == {"autograd_cache_bypass": 1, "fxgraph_cache_bypass": 2}
        assert outcome.changed
        assert not outcome.from_cache


# --- measured numbers


def test_a_process_with_the_same_numbers_is_served_the_plan_they_led_to(runs: Runs) -> None:
    first, second = (run[Compilation(tokens=80, setting="same numbers")] for run in runs)
    assert first.is_miss, first.counts
    assert re.search(r"\(\+\d", first.report)  # fewer launches, for which it takes more FLOPs
    assert second.is_hit, second.counts
    assert second.values == first.values


def test_a_process_with_other_numbers_makes_a_plan_of_its_own(runs: Runs) -> None:
    """The stored profile has changed between the two processes."""
    first = runs[0][Compilation(tokens=112, setting="numbers")]
    second = runs[1][Compilation(tokens=112, setting="other numbers")]
    assert first.is_miss, first.counts
    assert re.search(r"\(-\d", first.report)  # fewer FLOPs
    assert second.is_miss, second.counts
    assert re.search(r"\(\+\d", second.report)  # fewer launches
    assert second.values == pytest.approx(first.values, rel=1e-5)


# --- what the key is made of


class _UsersPass(CustomGraphPass):
    def __init__(self, identity: str | None) -> None:
        self._identity = identity

    def __call__(self, graph: fx.Graph) -> None: ...

    def uuid(self) -> str | None:
        return self._identity


def test_identity_tells_every_option_and_every_users_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    different = [Options(), Options(strict=True), Options(objective="flops"), Options(margin=0.5)]
    different += [Options(tune="off"), Options(memory="low"), Options(numerics="strict")]
    fast = Options(memory="fast", memory_budget=1)
    different += [fast, replace(fast, reuse=True), Options(device="h100")]
    different += [Options(upcast=False)]
    assert len(different) == 1 + len(fields(Options))
    passes = [RunloraPass(options) for options in different]
    passes += [RunloraPass(before=[_UsersPass(name) for name in names]) for names in ("a", "ab")]
    passes += [RunloraPass(before=[_UsersPass("b"), _UsersPass("a")])]
    identities = [own.uuid() for own in passes]
    assert len(set(identities)) == len(passes)
    assert RunloraPass(Options()).uuid() == identities[0]
    monkeypatch.setattr("runlora_fx.joint_pass._source_hash", lambda: b"another")
    assert not {own.uuid() for own in passes} & set(identities)


@pytest.mark.usefixtures("no_profile")
@pytest.mark.parametrize(
    "newer",
    (
        Record({name: 1.0 for name in FLOPS_BOUND}),
        Record(products={GemmShape(1, 8, 16, 32): 1.0}),
        Record(plans={"a problem": {"a plan": 1.0}}),
    ),
    ids=("rates", "products", "plans"),
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_changes_with_every_number_that_plans_depend_on(dtype: str, newer: Record) -> None:
    timed = [Options(tune=tune) for tune in ("profile", "shapes", "plans")]
    untimed = [
        Options(tune="off"),
        Options(objective="flops"),
        Options(objective="flops", tune="plans"),
    ]
    before = [RunloraPass(options).uuid() for options in (*timed, *untimed)]
    early = RunloraPass(timed[0])
    assert early.uuid() == before[0]
    store.add(key_of(torch.device("cpu"), dtype), newer)
    after = [RunloraPass(options).uuid() for options in (*timed, *untimed)]
    changed = [old != new for old, new in zip(before, after, strict=True)]
    assert changed == [True] * len(timed) + [False] * len(untimed)
    # One pass speaks of one state of the machine: it plans by the numbers that it read first.
    assert early.uuid() == before[0]


def test_no_identity_if_a_users_pass_has_none() -> None:
    assert RunloraPass(before=[lambda graph: None]).uuid() is None
    assert RunloraPass(before=[_UsersPass("a"), _UsersPass(None)]).uuid() is None
