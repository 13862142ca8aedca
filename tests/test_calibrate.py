"""`python -m runlora_fx calibrate` as a user runs it: real processes that measure for a moment."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import without_logs_of_torch

from runlora_fx.__main__ import main
from runlora_fx.cost_model import store
from runlora_fx.cost_model.cost import TERMS
from runlora_fx.cost_model.devices import calibration, measure
from runlora_fx.cost_model.devices.machine import Machine, default_profile, key_of
from runlora_fx.cost_model.store import FOLDER_VARIABLE

CPU = torch.device("cpu")


def calibrate(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "runlora_fx", "calibrate", *arguments],
        env={**os.environ, FOLDER_VARIABLE: str(folder)},
        cwd=Path(store.__file__).parents[2],
        capture_output=True,
        text=True,
    )


PLANS = """
import torch
from runlora_fx.cost_model.devices import measure
from runlora_fx.cost_model.devices.machine import Machine
print(Machine(use_stored=True).profile(torch.device("cpu"), "float32").seconds_per["flops.nt"])
"""


def test_it_measures_stores_and_shows_how_well_the_rates_predict(no_profile: Path) -> None:
    done = calibrate(no_profile, "--seconds", "8", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert not without_logs_of_torch(done.stderr)

    # Nothing but the one profile, and in it all rates.
    assert [path.name for path in no_profile.glob("*.json")] == [key_of(CPU, "float32").file_name]
    record = store.load(key_of(CPU, "float32"))
    assert not record.products
    timed = {name for name, term in TERMS.items() if term.is_timed}
    assert set(record.seconds_per) == timed - {"flops.upcast"}  # that is for 16 bits
    # Of no machine that runs this is a product slower or faster.
    assert 1e8 < 1 / record.seconds_per["flops.nt"] < 1e15

    # A table of products, each with two times, and their difference as a share.
    rows = re.findall(
        r"\((\d+), (\d+)\) @ \(\2, (\d+)\) . (?:n|t){2} .*?(\d+) us . +(\d+) us . +([+-]\d+)%",
        done.stdout,
    )
    assert len(rows) >= 12
    profile = record.profile(default_profile(CPU, "float32"))
    shown = " ".join(done.stdout.split())
    assert f"flops.nt {1e-9 / profile.seconds_per['flops.nt']:.3g} GFLOP/s" in shown
    for m, k, n, measured, predicted, error in rows:
        seconds = 2 * int(m) * int(k) * int(n) * profile.seconds_per_flop
        assert int(predicted) >= int(seconds * 1e6) - 1
        if int(measured) > 500:  # shown to the microsecond
            assert int(error) == pytest.approx(100 * (int(predicted) / int(measured) - 1), abs=1)
    assert re.search(r"median error \d+%", shown)
    assert str(no_profile) in done.stdout

    # Another process plans by it, and so does this one.
    other = subprocess.run([sys.executable, "-c", PLANS], capture_output=True, text=True)
    assert float(other.stdout) == profile.seconds_per["flops.nt"], other.stderr
    assert Machine(use_stored=True).profile(CPU, "float32") == profile


def test_too_little_time_stores_nothing_and_says_so(no_profile: Path) -> None:
    done = calibrate(no_profile, "--seconds", "0.001", "--dtype", "float32", "bfloat16")
    assert done.returncode == 1
    for dtype in ("float32", "bfloat16"):
        assert f"{dtype}: nothing stored, the time was too short" in done.stdout
    assert "Stored in" not in done.stdout
    assert not list(no_profile.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (("--device", "banana"), r"--device banana cannot be used"),
        (("--device", "meta"), r"--device meta cannot be used"),
        (("--seconds", "0"), r"--seconds must be positive, not 0"),
        (("--seconds", "-3"), r"--seconds must be positive, not -3"),
        (("--seconds", "nan"), r"--seconds must be positive, not nan"),
        (("--seconds", "soon"), r"Invalid value for '--seconds'"),
        (("--dtype", "int8"), r"'int8' is not one of .*'float32'"),
    ),
    ids=" ".join,
)
def test_what_is_not_valid_is_refused_in_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], no_profile: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error
    assert not list(no_profile.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["calibrate", "--device", "cuda"])
    assert "--device cuda cannot be used" in capsys.readouterr().err


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few small products only: they are measured really."""
    monkeypatch.setattr(calibration, "_FITTED", ((8, 16), (16,), (4,)))
    monkeypatch.setattr(calibration, "_CHECKED", ((8,), (16,), (4,)))
    monkeypatch.setattr(calibration, "_ADDED", ((16, 16),))


@pytest.mark.usefixtures("quick")
def test_what_is_measured_holds_for_one_precision(no_profile: Path) -> None:
    before = torch.get_float32_matmul_precision()
    assert main(["calibrate", "--dtype", "float32", "--matmul-precision", "medium"]) == 0
    assert torch.get_float32_matmul_precision() == before
    assert not store.load(key_of(CPU, "float32")).seconds_per
    torch.set_float32_matmul_precision("medium")
    try:
        assert store.load(key_of(CPU, "float32")).seconds_per
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("quick")
def test_times_that_noise_hides_are_stored(
    no_profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel without the special function or the random number seems to take longer.
    monkeypatch.setattr(measure, "seconds", lambda run, device: 1e-6)
    assert main(["calibrate", "--dtype", "float32"]) == 0
    stored = store.load(key_of(CPU, "float32")).seconds_per
    assert 0 < stored["special"] == stored["random"] < 1e-15
    assert 0 < stored["picked"] < 1e-15


@pytest.mark.usefixtures("quick")
def test_where_nothing_can_be_stored_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "a file"))
    assert main(["calibrate", "--dtype", "float32"]) == 1
    shown = capsys.readouterr().out
    assert "nothing stored" in " ".join(shown.split())
    assert "cannot be written to" in " ".join(shown.split())
    assert "Stored in" not in shown


def test_an_accelerator_is_measured_with_larger_products() -> None:
    """All that a host is measured with is below 8 GFLOP, which takes a GPU less than a launch."""
    largest = {}
    for is_host in (True, False):
        shapes = calibration._shapes(calibration._FITTED, is_host=is_host)
        flops = [float(shape.product(4).cost.flops) for shape in shapes]
        largest[is_host] = max(flops)
        assert min(flops) < 1e8
    assert 1e9 < largest[True] <= 8e9
    assert 1e11 < largest[False] <= 1e12
