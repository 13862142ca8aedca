"""The command line as a whole: help, completion, pipes, and documentation that names everything."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from processes import without_logs_of_torch
from typer.testing import CliRunner

import runlora_fx
from runlora_fx.__main__ import main
from runlora_fx.cli import calibrate, console
from runlora_fx.cli.app import app

ROOT = Path(__file__).parent.parent
COMMANDS = ("explain", "crossover", "gain", "calibrate", "demo", "doctor")


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A process whose output is piped."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def tree() -> Iterator[tuple[str, Any]]:
    """The commands by name, with their parameters."""
    group: Any = typer.main.get_command(app)
    yield from group.commands.items()


def test_the_commands_are_these() -> None:
    assert tuple(name for name, _ in tree()) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name: str) -> None:
    command = dict(tree())[name]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "hidden", False) or parameter.help, parameter.name
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for option in options_of(command):
        assert option in shown.output


def options_of(command: Any) -> list[str]:
    """The long options of a command."""
    names = [name for parameter in command.params for name in parameter.opts]
    return [name for name in names if name.startswith("--") and name != "--help"]


def test_the_documentation_names_every_command_and_option() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    by_name = {section.split()[0].strip("`"): section for section in sections[1:]}
    for name, command in tree():
        assert name in by_name, f"docs/commands.md has no section {name}"
        named = set(re.findall(r"^\| `(--[\w-]+)", by_name[name], re.MULTILINE))
        assert named == set(options_of(command)), name
        screen = f"screens/{name}.txt"
        assert (ROOT / "docs" / screen).is_file()
        # The screen is what docs/make_screens.py wrote.
        shown = (ROOT / "docs" / screen).read_text(encoding="utf-8")
        assert f"```text\n{shown}```" in by_name[name], f"{screen}: run docs/make_screens.py"


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"runlora-fx {runlora_fx.__version__}\n"


def test_help_and_completion_need_no_torch() -> None:
    code = "import sys; from runlora_fx.__main__ import main; main(['--help'])"
    done = run("-c", f"{code}; print([m for m in ('torch', 'peft') if m in sys.modules])")
    assert done.stdout.rstrip().endswith("[]"), done.stdout
    assert done.stderr == ""


def test_commands_are_completed() -> None:
    words = {"COMP_WORDS": "runlora c", "COMP_CWORD": "1"}
    done = run("-m", "runlora_fx", _RUNLORA_COMPLETE="complete_bash", **words)
    assert done.stdout.split() == ["crossover", "calibrate"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Commands: explain, crossover, gain, calibrate, demo, doctor"),
        (["train"], "Commands: explain,"),
        (["explain"], "Missing argument"),
        (["doctor", "--compiles"], "Options: --compile, --json"),
        (["calibrate", "float32"], "write --dtype before float32"),
        (["calibrate", "--matmul-precision", "low"], "'highest', 'high', 'medium'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_an_answer(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert "Traceback" not in shown.err
    assert not shown.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dtype", "float32", "bfloat16"],
        ["--dtype", "float32", "--dtype", "bfloat16"],
        ["--dtype", "float32", "bfloat16", "float32", "--seconds", "45"],
        [],
    ],
    ids=" ".join,
)
def test_several_dtypes_are_given_in_both_ways(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(calibrate, "run", lambda *args: given.extend(args) or 1)
    assert main(["calibrate", *arguments]) == 1
    assert given == ["", ["float32", "bfloat16"], "highest", 45.0, None]


def test_progress_goes_to_terminals_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        with console.status("Doing ..."), console.progress() as bar:
            list(bar.track(range(3), description="counting"))
        shown = capsys.readouterr()
        assert not shown.out
        if sys.stderr.isatty():
            assert "counting" in shown.err
        else:
            assert not shown.err
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert console.results().width > 1000  # stdout is captured here, and no terminal


MODEL = """
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(64, 64).requires_grad_(False)
        self.lora_A = nn.Linear(64, 4, bias=False)
        self.lora_B = nn.Linear(4, 64, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))

def build():
    return Layer(), (torch.empty(512, 64),)
"""


def test_what_is_piped_is_the_result_alone(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    done = run("-m", "runlora_fx", "explain", str(tmp_path / "model.py"), "--objective", "flops")
    assert done.returncode == 0
    assert without_logs_of_torch(done.stderr) == ""
    assert done.stdout.startswith("runlora: 1 of 1 adapted layer rewritten")


def test_public_names_are_imported_when_they_are_used() -> None:
    assert set(runlora_fx._MODULES) == set(runlora_fx.__all__)
    assert set(runlora_fx.__all__) <= set(dir(runlora_fx))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = runlora_fx.nothing
    code = "import sys, runlora_fx; early = 'torch' in sys.modules; from runlora_fx import Options"
    assert run("-c", f"{code}; print(early, Options().memory)").stdout.split() == [
        "False",
        "balanced",
    ]
