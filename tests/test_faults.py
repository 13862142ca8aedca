"""Faults: whatever fails, results stay right, with one warning; and what is on disk stays whole.

``python -m tests.faults`` makes every function fail that is called across rooms. Here some do.
"""

import copy
import json
import os
import pickle  # noqa: TID251 - of our own models, from memory
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from checks import RUNLORA, RUNLORA_EAGER
from torch import Tensor, nn

import runlora_fx
from runlora_fx import stored_reports
from runlora_fx.cost_model import store
from runlora_fx.cost_model.ops import GemmShape
from runlora_fx.cost_model.store import FOLDER_VARIABLE, Key, Record
from runlora_fx.passes.read.posing import Poser
from runlora_fx.report.data import Report
from tests import faults
from tests.faults import FINE, NAMES, boundaries, name_of, raising, run_pass, sites_changed
from tests.mutations.graphs import GRAPHS
from tests.mutations.run import quietly, values_of

ROOT = Path(__file__).parents[1]
KEY = Key("a device 9.0", "float32", "2.13.0", "threads=2")
SHAPE = GemmShape(1, 2, 3, 4)


class Adapted(nn.Module):
    """A linear layer with a LoRA adapter."""

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(24, 24, bias=False).requires_grad_(False)
        self.a = nn.Linear(24, rank, bias=False)
        self.b = nn.Linear(rank, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + 2.0 * self.b(self.a(x))
        return y


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    yield tmp_path


# --- exceptions


def check(name: str, every: int, begin: int = 0) -> int:
    """Make every so manieth function fail on a graph, and return how many did."""
    came = GRAPHS[name]()
    run_pass(came)
    most = sites_changed()
    wanted, codes = values_of(came, came.module), boundaries(lambda: run_pass(came))
    assert len(codes) > 150
    found = {
        name_of(code): faults.outcome(came, wanted, code, most=most) for code in codes[begin::every]
    }
    assert not {where: what for where, what in found.items() if what not in FINE}
    return len(found)


@pytest.mark.parametrize("begin", (1,))
def test_a_failing_function_leaves_results_right_with_one_warning(begin: int) -> None:
    assert check("two kinds of layers", 50, begin) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_failing_function_leaves_results_right_with_one_warning(name: str) -> None:
    assert check(name, 1) > 150


def test_a_fault_in_one_region_leaves_the_gains_of_the_others() -> None:
    """The reading of the first region fails, in the midst of it."""
    came = GRAPHS["two kinds of layers"]()
    run_pass(came)
    most = sites_changed()
    with quietly() as said, raising(Poser.pose.__code__):
        run_pass(came)
    assert len(said) == 1
    assert 0 < sites_changed() < most


@pytest.mark.parametrize("backend", (RUNLORA_EAGER, pytest.param(RUNLORA, marks=pytest.mark.slow)))
def test_whatever_fails_around_the_pass_a_model_compiles(backend: str) -> None:
    """The functions that the backend itself calls, from Dynamo's call on."""
    model, x = Adapted(), torch.randn(64, 24)
    wanted = model(x)

    def compiled() -> Tensor:
        torch._dynamo.reset()
        y: Tensor = torch.compile(model, backend=backend)(x)
        return y

    compiled()
    codes = [code for code in boundaries(compiled) if _is_around(code)]
    assert len(codes) >= 5
    for code in codes:
        with quietly() as said, raising(code):
            torch.testing.assert_close(compiled(), wanted)
        assert len(said) <= 1, (name_of(code), said)


def _is_around(code: CodeType) -> bool:
    """True for what a compilation calls besides the pass, and what has no guard of its own."""
    room, name = name_of(code).split(": ")
    rooms = ("history.py", "stored_reports.py", "logs.py", "_torch_debug.py", "_torch_compat.py")
    return room in rooms or name.endswith("identity")


# --- folders


def test_a_folder_that_may_not_be_written_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Read-only, whoever the user is: root may write to any folder, so the system says no here."""

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store.tempfile, "NamedTemporaryFile", denied)
    assert store.add(KEY, Record(products={SHAPE: 1.0})).products == {SHAPE: 1.0}
    stored_reports.stored(stored_reports.Key("0" * 8), Report(graph="joint"))
    assert len(caplog.records) == 1
    assert "Permission denied" in caplog.text


@pytest.mark.parametrize("error", (OSError(28, "No space left on device"), OSError(5, "I/O error")))
def test_a_report_that_cannot_be_stored_is_shown_all_the_same(
    error: OSError, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(stored_reports, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    key, report = stored_reports.Key("0" * 8), Report(graph="joint")
    assert stored_reports.stored(key, report) == report
    assert "no report is stored" in str(stored_reports.read(key).note)
    assert not list((tmp_path / "runlora").iterdir())


def test_clocks_that_jump_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files from the future, from 1970, and a clock that goes back between two writes."""
    store.add(KEY, Record(products={SHAPE: 1.0}))
    path = store.folder() / KEY.file_name
    for at in (time.time() + 10**9, 0.0):
        os.utime(path, (at, at))
        monkeypatch.setattr(time, "time", lambda at=at: 10**9 - at)
        other = GemmShape(1, 1, 1, 1 + int(at > 0))
        store.add(KEY, Record(products={other: 2.0}))
        assert store.load(KEY).products[SHAPE] == 1.0
        assert store.load(KEY).products[other] == 2.0


WRITES = """
import sys
from runlora_fx.cost_model import store
from runlora_fx.cost_model.ops import GemmShape
from runlora_fx.cost_model.store import Key, Record
key, first = Key(*{key!r}), int(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for size in range(first, first + 5):
    store.add(key, Record(products={{GemmShape(1, size, 2, 3): size * 1e-6}}))
"""


def test_eight_processes_write_at_once_and_lose_nothing(tmp_path: Path) -> None:
    script = WRITES.format(key=tuple(KEY))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(1 + 5 * i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for i in range(8)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("go\n")
        assert process.returncode == 0
    assert len(store.load(KEY).products) == 40
    assert not list(tmp_path.glob("*.tmp"))


# --- threads, processes, copies


def test_eight_threads_compile_at_once_each_with_its_own_report() -> None:
    """The rank of an adapter stands in the report of its model, and in no other."""
    ranks, reports = range(1, 9), dict[int, Any]()
    failed: list[BaseException] = []
    x = torch.randn(64, 24)
    models = {rank: Adapted(rank) for rank in ranks}
    torch._dynamo.reset()
    torch._dynamo.lookup_backend(RUNLORA_EAGER)  # torch finds a name once, and not in two threads

    def work(rank: int) -> None:
        try:
            model = models[rank]
            compiled = torch.compile(model, backend=RUNLORA_EAGER)
            torch.testing.assert_close(compiled(x), model(x))
            reports[rank] = runlora_fx.report_of(compiled)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sorted(reports) == [*ranks]
    for rank, report in reports.items():
        assert {site.shapes.split("r=")[1] for site in report.sites} == {str(rank)}


def _in_a_worker(connection: Any, x: Tensor, model: nn.Module) -> None:
    compiled = torch.compile(model, backend=RUNLORA_EAGER)
    y = compiled(x)
    report = runlora_fx.report_of(compiled)
    assert report is not None
    apart = float((y - model(x)).abs().max())
    connection.send(json.dumps({"apart": apart, "changed": [s.changed for s in report.sites]}))


@pytest.mark.parametrize("method", ("fork", pytest.param("spawn", marks=pytest.mark.slow)))
def test_workers_compile_for_themselves(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent that has compiled starts a worker that compiles too."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
    context = torch.multiprocessing.get_context(method)
    model, x = Adapted(), torch.randn(64, 24)
    with torch.no_grad():
        torch.compile(model, backend=RUNLORA_EAGER)(x)
    here, there = context.Pipe()
    worker = context.Process(target=_in_a_worker, args=(there, x, model))
    worker.start()
    assert here.poll(120)
    found = json.loads(here.recv())
    worker.join()
    assert worker.exitcode == 0
    assert found["changed"] == [True]
    assert found["apart"] < 1e-4


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_a_compiled_model_is_copied_and_pickled(copied: Callable[[Any], Any]) -> None:
    model, x = Adapted(), torch.randn(64, 24)
    model.compile(backend=RUNLORA_EAGER)
    wanted = model(x)
    other = copied(model)
    torch.testing.assert_close(other(x), wanted)
    other.b.weight.data.zero_()  # a copy has weights of its own
    torch.testing.assert_close(model(x), wanted)
    assert not torch.allclose(other(x), wanted)


@pytest.mark.parametrize("backend", (RUNLORA_EAGER, pytest.param(RUNLORA, marks=pytest.mark.slow)))
def test_after_a_reset_everything_is_compiled_anew(backend: str) -> None:
    model, x = Adapted(), torch.randn(64, 24)
    compiled = torch.compile(model, backend=backend)
    first, report = compiled(x), runlora_fx.report_of(compiled)
    for _ in range(3):
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(x), first)
        again = runlora_fx.report_of(compiled)
        assert again is not None and report is not None
        assert [site.changed for site in again.sites] == [site.changed for site in report.sites]
