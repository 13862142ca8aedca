"""`runlora doctor`: what it finds, its exit status, and that each problem says what to do."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from processes import python, without_logs_of_torch
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

from runlora_fx.__main__ import main
from runlora_fx.cli.doctor import command, devices, folders, inductor, installed, self_test
from runlora_fx.cli.doctor.finding import Finding, verdict
from runlora_fx.cost_model.devices.machine import key_of
from runlora_fx.cost_model.store import FOLDER_VARIABLE

ROOT = Path(__file__).parent.parent


def found(capsys: pytest.CaptureFixture[str]) -> list[Finding]:
    """What `doctor --json` printed."""
    return [Finding(**one) for one in json.loads(capsys.readouterr().out)["findings"]]


def problems(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.state == "problem"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the self-test, which has a test of its own."""
    monkeypatch.setattr(self_test, "check", lambda backend: iter(()))


def test_a_machine_without_problems(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    findings = found(capsys)
    assert problems(findings) == []
    assert status == 0
    areas = {finding.area for finding in findings}
    areas_wanted = {"installed", "compiler", "devices", "profiles", "caches", "backends"}
    assert areas == areas_wanted | {"settings", "self-test"}
    by_name = {finding.name: finding for finding in findings}
    assert by_name["torch"].text.startswith(metadata.version("torch"))
    assert re.search(r"\d+\.\d+", by_name["C++"].text)
    assert by_name["runlora_eager"].state == by_name["runlora"].state == "ok"
    assert "was rewritten" in by_name["backend='runlora_eager'"].text
    # The tests store profiles of the CPU.
    (profile,) = [finding for finding in findings if finding.area == "profiles"]
    assert profile.state == "ok"
    assert "float32 today" in profile.text


@pytest.mark.usefixtures("quick")
def test_a_table_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(inductor.cpp_builder, "get_cpp_compiler", none)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"^problem +compiler +C\+\+ +Inductor finds none", shown, re.MULTILINE)
    assert "-> install g++ or clang" in shown
    assert "1 problem, " in shown


@pytest.mark.usefixtures("quick")
def test_a_torch_that_is_too_old_is_a_problem_and_is_not_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "2.4.0+cpu" if name == "torch" else version(name)
    )
    assert main(["doctor", "--json"]) == 1
    findings = found(capsys)
    (problem,) = problems(findings)
    assert problem.name == "torch"
    assert "2.4.0+cpu; needs >=2.11" in problem.text
    assert "pip install 'torch>=2.11'" in problem.remedy
    assert {finding.area for finding in findings} == {"installed"}


def test_a_missing_torch_and_one_that_is_too_new(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "2.99.1" if name == "torch" else version(name)
    )
    (torch_found,) = [finding for finding in installed.check() if finding.name == "torch"]
    assert torch_found.state == "warning"
    assert installed.is_torch_usable()

    def missing(name: str) -> str:
        if name in ("torch", "peft"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", missing)
    states = {finding.name: finding.state for finding in installed.check()}
    assert states["torch"] == "problem"
    assert states["peft"] == "ok"  # nobody has to have it
    assert not installed.is_torch_usable()


def test_the_newest_torch_is_the_one_of_the_documentation() -> None:
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (2\.\d+)\.\d+ \| \d+", text, re.MULTILINE)
    assert max(rows, key=lambda row: int(row.partition(".")[2])) == installed.NEWEST_TORCH


@pytest.mark.parametrize("name", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_variables_that_switch_compilation_off_are_a_problem(name: str) -> None:
    (problem,) = inductor.settings({name: "1"})
    assert (problem.state, problem.remedy) == ("problem", f"unset {name}")
    (fine,) = inductor.settings({name: "0"})
    assert fine.state == "ok"


def test_settings_that_do_not_go_with_ours() -> None:
    with inductor_config.patch(post_grad_custom_pre_pass=print):
        (warning,) = inductor.settings({})
    assert (warning.name, warning.state) == ("post_grad_custom_pre_pass", "warning")
    with functorch_config.patch(activation_memory_budget=0.0):
        (problem,) = inductor.settings({})
    assert problem.state == "problem"
    with (
        functorch_config.patch(activation_memory_budget=0.5),
        inductor_config.patch(fallback_random=True),
    ):
        (warning,) = inductor.settings({})
    assert warning.state == "warning"
    with inductor_config.patch(fx_graph_cache=False):
        assert "FX graph cache" in [finding.name for finding in inductor.caches()]
    (substitutes,) = inductor.settings({"RUNLORA_SUBSTITUTES": "0"})
    assert substitutes.state == "warning"


def test_a_backend_that_torch_does_not_find_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "list_backends", lambda: ["inductor", "runlora"])
    states = {finding.name: finding.state for finding in inductor.backends()}
    assert states == {"runlora": "ok", "runlora_eager": "problem"}


def test_damaged_profiles_are_named(no_profile: Path) -> None:
    names = [finding.name for finding in folders.profiles_folder()]
    assert names == ["runlora"]
    (no_profile / "damaged.json").write_text("{")
    (no_profile / "old.json").write_text('{"format": 1}')
    whole, damaged, old = folders.profiles_folder()
    assert whole.state == "ok"
    assert "2 files" in whole.text
    assert (damaged.name, damaged.state) == ("damaged.json", "warning")
    assert "made by another version" in old.text
    assert str(no_profile / "old.json") in old.remedy


def test_a_folder_that_cannot_be_used_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "a file" / "cache"))
    (problem,) = folders.profiles_folder()
    assert problem.state == "problem"
    assert FOLDER_VARIABLE in problem.remedy


def test_a_machine_that_was_not_calibrated_gets_the_command(no_profile: Path) -> None:
    assert not (no_profile / key_of(torch.device("cpu"), "float32").file_name).exists()
    (warning,) = [finding for finding in devices.check() if finding.area == "profiles"]
    assert warning.state == "warning"
    assert warning.remedy.startswith("runlora calibrate --device ")


def test_the_self_test_fails_for_a_backend_that_rewrites_nothing() -> None:
    (fine,) = self_test.check("runlora_eager")
    assert fine.state == "ok"
    (unknown,) = self_test.check("no_such_backend")
    assert unknown.state == "problem"
    assert unknown.text.startswith("failed: ")


def test_the_self_test_compiles_with_inductor(capfd: pytest.CaptureFixture[str]) -> None:
    (fine,) = self_test.check("runlora")
    assert (fine.name, fine.state) == ("backend='runlora'", "ok")
    assert "a LoRA layer was rewritten; results equal eager mode" in fine.text
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "text", "remedy"),
    (
        ("exit 1", "there is no C++ compiler that works", "install one"),
        (
            'case "$1" in --version|-dumpversion) exec g++ "$@";; esac\necho no disk >&2\nexit 1',
            "the C++ compiler fails: no disk",
            "name another one in CXX",
        ),
    ),
    ids=("none", "fails"),
)
def test_a_compiler_that_fails_is_the_problem_and_not_ours(
    script: str, text: str, remedy: str, tmp_path: Path
) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    done = python(
        *("-m", "runlora_fx", "doctor", "--compile", "--json"),
        CXX=str(compiler),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
    )
    assert (done.returncode, done.stderr) == (1, "")
    tested = [one for one in json.loads(done.stdout)["findings"] if one["area"] == "self-test"]
    assert [one["state"] for one in tested] == ["ok", "problem"]
    assert tested[1]["text"] == text
    assert remedy in tested[1]["remedy"]


def test_a_check_that_fails_is_a_problem_and_not_a_crash() -> None:
    def broken() -> list[Finding]:
        raise OSError("gone")

    (problem,) = command._tried("caches", broken)
    assert problem.state == "problem"
    assert "OSError: gone" in problem.text


def test_the_verdict_counts() -> None:
    assert verdict([]) == "No problem found."
    one = Finding("a", "b", "problem", "c")
    two = Finding("a", "b", "warning", "c")
    assert verdict([one, two, two]) == "1 problem, 2 warnings."


def test_what_is_piped_is_whole_and_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runlora_fx", "doctor"],
        env={**os.environ, FOLDER_VARIABLE: str(tmp_path / ("long" * 40))},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert without_logs_of_torch(done.stderr) == ""
    assert str(tmp_path / ("long" * 40)) in done.stdout
