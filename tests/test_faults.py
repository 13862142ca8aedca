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

    def __init__(self, scaling: float = 2.0) -> None:
        super().__init__()
        self.base = nn.Linear(24, 24, bias=False).requires_grad_(False)
        self.a = nn.Linear(24, 2, bias=False)
        self.b = nn.Linear(2, 24, bias=False)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.scaling * self.b(self.a(x))
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
        name_of(code): faults.outcome(came, wanted, code, most=most)
        for code in codes[begin::every]
    }
    assert not {where: what for where, what in found.items() if what not in FINE}
    return len(found)


@pytest.mark.parametrize("begin", (1, 6))
def test_a_failing_function_leaves_results_right_with_one_warning(begin: int) -> None:
    assert check("two kinds of layers", 20, begin) > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_failing_function_leaves_results_right_with_one_warning(name: str) -> None:
    assert check(name, 1) > 150


def test_a_fault_in_one_region_leaves_the_gains_of_the_others() -> None:
    """The reading of the first region fails, in the midst of it."""
    came = GRAPHS["two kinds of layers"]()
    run_pass(came)
    most = sites_changed()
    (pose,) = [c for c in boundaries(lambda: run_pass(came)) if name_of(c).endswith("Work.problem")]
    del pose
    from runlora_fx.passes.read.posing import Poser

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
    """True for what a compilation calls besides the pass."""
    room = name_of(code).split(":")[0]
    return room in ("history.py", "stored_reports.py", "logs.py", "inactive.py", "passes/tune")
