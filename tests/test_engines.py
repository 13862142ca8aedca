"""Several processes: DDP and FSDP2 with a small model; the others of ``tests.engines`` are slow."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import python
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from runlora_fx import _torch_group
from runlora_fx.cost_model.devices import machine
from runlora_fx.cost_model.profile import DEFAULT_PROFILE, MachineProfile
from runlora_fx.cost_model.store import Key, Record
from tests.engines.cases import ENGINES
from tests.engines.launch import ROOT, run
from tests.engines.quick import RANKS, ROWS, TOKENS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks saw, whose profiles contradict each other."""
    folder = str(tmp_path_factory.mktemp("ranks"))

    def rank(which: int) -> Any:
        command = ("-m", "tests.engines.quick", str(which), folder)
        return python(*command, PYTHONPATH=str(ROOT))

    with ThreadPoolExecutor(RANKS) as pool:
        done = list(pool.map(rank, range(RANKS)))
    assert [process.returncode for process in done] == [0, 0], done[0].stderr[-2000:]
    return [json.loads(process.stdout.splitlines()[-1]) for process in done]


@pytest.mark.parametrize("engine", ("ddp", "fsdp2"))
def test_losses_are_those_of_one_process(engine: str, ranks: list[dict[str, Any]]) -> None:
    for i, wanted in enumerate(ranks[0]["alone"]):
        found = sum(rank[engine]["losses"][i] for rank in ranks) / RANKS
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("engine", ("ddp", "fsdp2"))
def test_ranks_plan_alike_whatever_each_has_measured(
    engine: str, ranks: list[dict[str, Any]]
) -> None:
    one, other = (rank[engine]["sites"] for rank in ranks)
    assert one == other
    assert any(changed for _, _, changed in one)
    # Each plans for its own rows.
    assert all(f"N={ROWS // RANKS * TOKENS}," in shapes for shapes, _, _ in one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine(name: str, tmp_path: Path) -> None:
    assert run(name, tmp_path).problems == []


@pytest.mark.slow
def test_a_simulated_rank_plans_its_part_of_the_layers() -> None:
    done = python("-m", "tests.simulation", "--tokens", "16384", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "q_proj (N=16384, i=8192, o=1024, r=16" in done.stdout  # 8192 / 8 outputs
    assert "frozen weights 1.99 GiB" in done.stdout


# --- agreeing


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group whose ranks are threads of this process."""
    store = dist.HashStore()
    monkeypatch.setattr(_torch_group, "is_in_group", lambda: True)
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)


@pytest.mark.usefixtures("two_ranks")
def test_the_first_rank_is_asked_and_the_others_use_its_answer() -> None:
    answers = [_torch_group.agree_in_group("rates", lambda i=i: f"{i}") for i in range(3)]
    assert answers == ["0", "0", "0"]
    assert _torch_group.agree_in_group("others", lambda: "") == ""


@pytest.mark.usefixtures("two_ranks")
def test_a_rank_that_fails_lets_nobody_wait() -> None:
    def fails() -> str:
        raise OSError("no clock")

    with pytest.raises(OSError, match="no clock"):
        _torch_group.agree_in_group("rates", fails)
    raised: list[Exception] = []

    def other() -> None:
        try:
            _torch_group.agree_in_group("rates", fails)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(_torch_group._GROUP_WAIT_S / 4)
    assert [str(error) for error in raised] == ["another rank failed: OSError: no clock"]


def test_ranks_on_other_models_of_a_device_plan_alike(
    two_ranks: None, no_profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Estimates differ between models, and the threads of a process are its own."""
    monkeypatch.setattr(machine, "is_in_group", lambda: True)
    found = []
    for rate in (1e-12, 1e-9):
        profile = MachineProfile({**DEFAULT_PROFILE.known, "flops.nn": rate})
        monkeypatch.setattr(machine, "default_profile", lambda *_, known=profile: known)
        settings = f"deterministic=False, threads={rate * 1e12:.0f}"
        key = Key(f"model of {rate}", "float32", "2", settings)
        monkeypatch.setattr(machine, "key_of", lambda *_, key=key: key)
        here = machine.Machine(use_stored=True)
        found.append(here.profile(torch.device("cpu"), "float32").known["flops.nn"])
    assert found == [1e-12, 1e-12]


def test_a_group_whose_store_fails_uses_own_times(
    no_profile: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> str:
        raise RuntimeError("the store is gone")

    machine._warn_of_ranks.cache_clear()
    monkeypatch.setattr(machine, "is_in_group", lambda: True)
    monkeypatch.setattr(machine, "agree_in_group", fails)
    for _ in range(2):
        record = machine.Machine(use_stored=True).record(torch.device("cpu"), "float32")
        assert record == Record()
    said = [r.getMessage() for r in caplog.records if r.name == "runlora_fx"]
    assert len(said) == 1 and "could not agree" in said[0] and "the store is gone" in said[0]


def test_a_fake_group_counts_as_none() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=64)
    try:
        assert not _torch_group.is_in_group()
        assert _torch_group.agree_in_group("rates", lambda: "mine") == "mine"
    finally:
        dist.destroy_process_group()
