"""The machine that the tests plan for: it is bound by FLOPs, and the same everywhere.

Plans depend on the profile of the machine. The tests count FLOPs, so they store a profile in which
bytes and launches cost just enough to break ties.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices.machine import DTYPES, key_of
from runlora_fx.cost_model.store import FOLDER_VARIABLE, Record

FLOPS_BOUND = {
    **dict.fromkeys(("flops.nn", "flops.nt", "flops.tn"), 1e-12),
    **dict.fromkeys(("read", "written", "elementwise", "launches", "special", "random"), 1e-25),
}

# Profiles are stored by thread count, so processes that tests start must use as many threads. Tests
# are small and run side by side, so each uses one thread.
os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
torch.set_num_threads(1)

# The first compile of a process measures the machine, but for this variable.
os.environ["CI"] = "true"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that rewrites `tests/goldens/`."""
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/goldens/")


@pytest.fixture(scope="session", autouse=True)
def _flops_bound_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Store the profile where this process and those it starts look for it."""
    folder = tmp_path_factory.mktemp("profiles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder))
        for dtype in DTYPES:
            store.add(key_of(torch.device("cpu"), dtype), Record(FLOPS_BOUND))
        yield folder


@pytest.fixture(autouse=True)
def _machine_stays(_flops_bound_machine: Path) -> Iterator[None]:
    """A test that stores times uses ``no_profile``, so that all others plan for one machine."""
    yield
    for path in _flops_bound_machine.glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["seconds_per"] != FLOPS_BOUND or record["products"] or record["plans"]:
            path.write_text(
                json.dumps({**record, "seconds_per": FLOPS_BOUND, "products": [], "plans": {}}),
                encoding="utf-8",
            )
            raise AssertionError(f"the test stored times in {path.name} and lacks `no_profile`")


@pytest.fixture
def no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for the profiles that a test measures."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def _forget() -> None:
    """Forget what the package remembers of problems that it has planned."""
    for name, module in sys.modules.items():
        if name.startswith("runlora_fx.passes."):
            for value in vars(module).values():
                forget = getattr(value, "cache_clear", None)
                if forget is not None:
                    forget()


@pytest.fixture
def nothing_remembered() -> Iterator[None]:
    """Plans that were made before the test are not found in it, and those of the test not after."""
    _forget()
    yield
    _forget()
