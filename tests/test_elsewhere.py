"""Planning for a device that is not in this machine, and for models without data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from market import FFN, HIDDEN
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import runlora_fx
from runlora_fx import Options
from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices.elsewhere import Elsewhere, export, machine_for
from runlora_fx.cost_model.devices.machine import Machine, key_of
from runlora_fx.cost_model.profile import DTYPES
from runlora_fx.cost_model.published import PUBLISHED, profiles_of
from runlora_fx.cost_model.store import Record

CPU = torch.device("cpu")


def layers() -> nn.Module:
    """Two adapted layers on the meta device."""
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(HIDDEN, FFN), nn.GELU(), nn.Linear(FFN, HIDDEN))
        config = LoraConfig(r=8, target_modules=["0", "2"])
        model: nn.Module = get_peft_model(base, config)  # type: ignore[arg-type, assignment]
    return model


# --- named devices


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_device_has_rates_for_every_dtype(name: str) -> None:
    profiles = profiles_of(name)
    assert set(profiles) == set(DTYPES)
    for dtype, profile in profiles.items():
        assert 0 < profile.seconds_per_flop <= profiles["float64"].seconds_per_flop, dtype
        assert profile.seconds_per["read"] == profiles["float32"].seconds_per["read"]
    assert PUBLISHED[name].source


def test_plans_follow_the_device_that_is_named() -> None:
    """Where FLOPs are cheap beside bytes, a merged weight needs more tokens to pay."""
    with FakeTensorMode():
        inputs = [
            torch.empty(size) for size in ((4096, 4096), (4096, 4096), (16, 4096), (4096, 16))
        ]

    def texts(device: str) -> str:
        gm = torch.fx.symbolic_trace(lambda x, w, a, b: x @ w.t() + x @ a.t() @ b.t())
        runlora_fx.rewrite(gm, inputs, device=device, strict=True)
        report = runlora_fx.last_report()
        assert report is not None
        return report.sites[0].break_even

    found = {texts(name) for name in PUBLISHED}
    assert len(found) > 1


def test_nothing_that_this_machine_measured_enters_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(store.FOLDER_VARIABLE, str(tmp_path))
    before = Elsewhere("h100").identity()
    store.add(key_of(CPU, "float32"), Record({"flops.nn": 1e-3}))
    there = Elsewhere("h100")
    assert there.identity() == before
    assert there.profile(CPU, "float32") == PUBLISHED["h100"].profile("float32")
    assert Elsewhere("a100").identity() != before
    assert machine_for("", use_stored=True).identity() == Machine(use_stored=True).identity()


@pytest.mark.parametrize("tune", ["shapes", "plans"])
def test_nothing_is_measured_for_a_device_that_is_not_here(tune: Any) -> None:
    with pytest.raises(ValueError, match=r"runlora.tune must be 'off' or 'profile' with"):
        Options(device="h100", tune=tune)


# --- exported profiles


def test_an_exported_profile_is_planned_by_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(store.FOLDER_VARIABLE, str(tmp_path / "here"))
    store.add(key_of(CPU, "float32"), Record({"flops.nn": 3e-12, "read": 5e-11}))
    file = tmp_path / "gpu.json"
    assert export(CPU, file) == ["float32"]
    wanted = Machine(use_stored=True).profile(CPU, "float32")

    monkeypatch.setenv(store.FOLDER_VARIABLE, str(tmp_path / "there"))
    found = Elsewhere(str(file)).profile(CPU, "float32")
    assert found.seconds_per == wanted.seconds_per
    assert found.seconds_per["flops.nn"] == 3e-12
    assert Options(device=str(file)).device == str(file)


def test_a_dtype_that_a_profile_lacks_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(store.FOLDER_VARIABLE, str(tmp_path))
    store.add(key_of(CPU, "float32"), Record({"flops.nn": 3e-12}))
    export(CPU, tmp_path / "gpu.json")
    there = Elsewhere(str(tmp_path / "gpu.json"))
    for _ in range(2):
        assert there.profile(CPU, "bfloat16") == there.profile(CPU, "float32")
    assert [r.message for r in caplog.records if "no rates for bfloat16" in r.message] != []
    assert len(caplog.records) == 1


@pytest.mark.parametrize("content", ["", "{}", '{"format": 3, "dtypes": {}}', "[1]"])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "profile.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"runlora.device must be a file that"):
        Options(device=str(file))


def test_what_was_never_calibrated_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(store.FOLDER_VARIABLE, str(tmp_path / "empty"))
    assert export(CPU, tmp_path / "gpu.json") == []
    assert not (tmp_path / "gpu.json").exists()


def test_exported_numbers_are_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(store.FOLDER_VARIABLE, str(tmp_path))
    store.add(key_of(CPU, "float32"), Record({"flops.nn": 3e-12}))
    export(CPU, tmp_path / "gpu.json")
    assert set(json.loads((tmp_path / "gpu.json").read_text())) == {"format", "dtypes"}


# --- models without data


def test_a_model_of_meta_tensors_is_explained_and_left_as_it_came() -> None:
    model = layers()
    before = dict(model.named_parameters())
    x = torch.empty(4096, HIDDEN, device="meta")
    report = runlora_fx.explain(model, x, device="h100", objective="flops", strict=True)
    assert [site.changed for site in report.sites] == [True, True]
    assert "Planned for H100 SXM5 80 GB (rates of the NVIDIA H100 datasheet)" in str(report)
    assert report.flops_after < report.flops_before
    assert all(p is before[name] and p.is_meta for name, p in model.named_parameters())


def test_data_next_to_meta_tensors_is_traced_as_shapes() -> None:
    report = runlora_fx.explain(layers(), torch.randn(4096, HIDDEN), strict=True)
    assert len(report.sites) == 2


def test_a_model_of_fake_tensors_is_explained() -> None:
    with FakeTensorMode():
        w, a, b = torch.empty(96, 64), torch.empty(4, 64), torch.empty(96, 4)
        x = torch.empty(4096, 64)

    def lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x @ w.t() + x @ a.t() @ b.t()

    report = runlora_fx.explain(lora, x, w, a, b, objective="flops", strict=True)
    assert [site.changed for site in report.sites] == [True]


def test_tied_weights_stay_tied() -> None:
    with torch.device("meta"):
        one, two = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
    two.weight = one.weight
    model = nn.Sequential(one, two)
    x = torch.empty(4, HIDDEN, device="meta")
    seen: list[int] = []
    two.register_forward_pre_hook(lambda m, _: seen.append(m.weight is one.weight))
    runlora_fx.explain(model, x, strict=True)
    assert all(seen)
    assert two.weight is one.weight
