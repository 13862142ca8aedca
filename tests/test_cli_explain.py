"""`runlora explain` as a user runs it: a model by its configuration or from a file, no weights."""

import json
import socket
from pathlib import Path

import pytest
from transformers import LlamaConfig

from runlora_fx.__main__ import main
from runlora_fx.cli import explain as command

BUILD = """
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(64, 64).requires_grad_(False)
        self.lora_A = nn.Linear(64, 4, bias=False)
        self.lora_B = nn.Linear(4, 64, bias=False)

    def forward(self, x, scale=1.0):
        return self.base_layer(x) + scale * self.lora_B(self.lora_A(x))

def build():
    return Layer(), (torch.empty(512, 64),), {"scale": 2.0}

def wrong():
    return Layer()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(BUILD)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    llama = LlamaConfig(
        vocab_size=64,
        hidden_size=4096,
        intermediate_size=8192,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    llama.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_configuration_is_explained_without_weights(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--rank", "8", "--dropout", "0.05", "--batch", "2", "--device", "h100"]
    assert main(["explain", str(config), "--tokens", "4096", *arguments]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("runlora: ") and " of 7 adapted layers rewritten" in first
    assert any("lora_dropout=0" in line for line in lines)
    assert not any("torch.autocast" in line for line in lines)
    assert any(line.endswith("saved as bits.") for line in lines)
    assert any(line.startswith("Planned for H100 SXM5 80 GB") for line in lines)


def test_a_function_in_a_file_is_explained_as_json(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", f"{file}:build", "--json", "--objective", "flops"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"].startswith("1 of 1 adapted layer rewritten")
    assert report["flops_after"] < report["flops_before"]


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    (
        ("nowhere.py:build", [], "there is no file nowhere.py"),
        ("FILE:missing", [], "has no function 'missing'"),
        ("FILE:wrong", [], "must return (model, arguments)"),
        ("FILE", ["--memory", "high"], "balanced"),
        ("FILE", ["--device", "h1000"], "h100"),
        ("FILE", ["--rank", "0"], "--rank must be at least 1"),
        ("FILE", ["--dropout", "1"], "--dropout must be in [0, 1)"),
        ("/no/such/folder", [], "cannot load the configuration"),
    ),
)
def test_mistakes_get_an_answer(
    model: str, arguments: list[str], words: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["explain", model.replace("FILE", str(file)), *arguments])
    assert error.value.code == 2
    assert words in capsys.readouterr().err


def test_a_web_page_is_written_as_well(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    arguments = ["--html", str(page), "--objective", "flops"]
    assert main(["explain", f"{file}:build", *arguments]) == 0
    assert capsys.readouterr().out.startswith("runlora: 1 of 1 adapted layer rewritten")
    assert "<html" in page.read_text(encoding="utf-8").lower()


def test_a_page_for_a_folder_that_is_not_there_is_refused_at_once(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["explain", f"{file}:build", "--html", "/no/such/folder/x.html"])
    assert "there is no folder /no/such/folder" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(command, "getproxies", dict)
    with pytest.raises(SystemExit) as stopped:
        main(["explain", "someone/a-model-that-is-not-cached"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "cannot load the configuration of 'someone/a-model-that-is-not-cached'" in error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 6
