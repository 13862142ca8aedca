"""What users get wrong, and the words that answer them; `docs/troubleshooting.md` quotes them."""

import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import RUNLORA, RUNLORA_EAGER
from peft import LoraConfig, PeftModel, get_peft_model
from processes import python
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, InvalidBackend

import runlora_fx

TROUBLESHOOTING = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
TOKENS, WIDTH = 96, 64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


@pytest.fixture
def model() -> PeftModel:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
    return get_peft_model(Net(), config)


def _look(model: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is logged about the inference graphs of a model."""
    torch._dynamo.reset()
    caplog.clear()
    with caplog.at_level(logging.INFO, "runlora_fx"), torch.no_grad():
        torch.compile(model, backend=RUNLORA_EAGER)(torch.randn(TOKENS, WIDTH))
    return [record.getMessage() for record in caplog.records if record.name == "runlora_fx"]


def _report() -> runlora_fx.Report:
    report = runlora_fx.last_report()
    assert report is not None
    return report


def _refusal(backend: str, **settings: Any) -> str:
    """The words with which a compilation is refused, without Dynamo's lines around them."""
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(Net(), backend=backend, **settings)(torch.randn(TOKENS, WIDTH))
    error = caught.value.inner_exception
    assert isinstance(error, ValueError)
    return str(error)


def _documented(words: str) -> bool:
    """True if the documentation quotes some words."""
    return words in " ".join(TROUBLESHOOTING.read_text(encoding="utf-8").split())


# --- models whose adapters take no part


def test_adapters_are_found(model: PeftModel, caplog: pytest.LogCaptureFixture) -> None:
    (line,) = _look(model, caplog)
    assert line.startswith("runlora: 2 of 2 adapted layers rewritten")


@pytest.mark.parametrize("how", ("never added", "merged and unloaded"))
def test_no_adapters(how: str, model: PeftModel, caplog: pytest.LogCaptureFixture) -> None:
    plain = Net() if how == "never added" else model.merge_and_unload()
    (line,) = _look(plain, caplog)
    words = "it has no adapter (none was added to the model, or merge_and_unload() merged it)"
    assert line == f"runlora leaves this inference graph as it came: {words}"
    assert _documented(words)
    assert not _report().sites


def test_merged_adapters(model: PeftModel, caplog: pytest.LogCaptureFixture) -> None:
    model.merge_adapter()
    (line,) = _look(model, caplog)
    words = "adapters are merged into the weights, so that nothing is left to reorder"
    assert words in line
    assert _documented(words)
    assert line.endswith("base_model.model.up, base_model.model.down")
    (refusal,) = _report().refusals
    assert refusal.nodes == ("base_model.model.up", "base_model.model.down")
    assert words in str(_report())

    model.unmerge_adapter()
    (line,) = _look(model, caplog)
    assert line.startswith("runlora: 2 of 2 adapted layers rewritten")
    assert not _report().refusals


def test_merged_adapters_of_a_model_inside_a_function(
    model: PeftModel, caplog: pytest.LogCaptureFixture
) -> None:
    model.merge_adapter()

    def loss(x: Tensor) -> Tensor:
        result: Tensor = model(x).sum()
        return result

    (line,) = _look(loss, caplog)
    assert "adapters are merged into the weights" in line


def test_disabled_adapters(model: PeftModel, caplog: pytest.LogCaptureFixture) -> None:
    with model.disable_adapter():
        (line,) = _look(model, caplog)
    words = "adapters are disabled (model.enable_adapter_layers() enables them)"
    assert words in line
    assert _documented(words)


def test_explain_says_that_adapters_are_merged(model: PeftModel) -> None:
    model.merge_adapter()
    report = runlora_fx.explain(model, torch.randn(TOKENS, WIDTH))
    assert "adapters are merged into the weights" in str(report)


# --- options

MISSPELT = {
    "memory": "runlora.memory",
    "memroy": "runlora.memory",
    "runlora_memory": "runlora.memory",
    "runlora:memory": "runlora.memory",
    "runlora-memory": "runlora.memory",
    "runlora_memory_budgt": "runlora.memory_budget",
    "RunLoRA.memory": "runlora.memory",
    "runlora.memroy": "runlora.memory",
    "max_autotun": "max_autotune",
}


@pytest.mark.parametrize("backend", (RUNLORA, RUNLORA_EAGER))
@pytest.mark.parametrize("name", MISSPELT)
def test_misspelt_options_get_the_name_that_was_meant(name: str, backend: str) -> None:
    message = _refusal(backend, options={name: "low"})
    assert message.startswith(f"unknown option {name}. Did you mean {MISSPELT[name]}? ")
    assert all(f"runlora.{field.name}" in message for field in fields(runlora_fx.Options))
    assert len(message) < 500  # Inductor's list has twenty thousand characters


def test_an_option_that_resembles_none() -> None:
    message = _refusal(RUNLORA, options={"qwertz": 1})
    assert message.startswith("unknown option qwertz. Options of runlora: runlora.strict, ")
    assert message.endswith("torch._inductor.list_options() lists those of Inductor")


def test_the_documentation_quotes_a_misspelt_option() -> None:
    message = _refusal(RUNLORA, options={"memory": "low"})
    assert _documented(message.split(" Options of")[0])


def test_inductors_options_may_be_written_with_dashes() -> None:
    message = _refusal(RUNLORA_EAGER, options={"epilogue-fusion": False})
    assert message == (
        "backend='runlora_eager' takes runlora.* options only, not ['epilogue-fusion']"
    )
    assert _documented(message.replace("epilogue-fusion", "max_autotune"))


def test_a_mode_without_a_compiler() -> None:
    message = _refusal(RUNLORA_EAGER, mode="max-autotune")
    assert message == (
        "backend='runlora_eager' takes no mode, not 'max-autotune': it runs graphs operator by "
        "operator. Modes are Inductor's; backend='runlora' takes them"
    )
    assert _documented(message)


def test_options_can_be_checked_before_compiling() -> None:
    """torch calls a backend at the first call of the model, and no sooner."""
    compiled = torch.compile(Net(), backend=RUNLORA, options={"runlora.memroy": "low"})
    assert compiled is not None
    with pytest.raises(TypeError, match="memroy"):
        runlora_fx.Options(memroy="low")  # type: ignore[call-arg]


# --- what torch itself says


def test_torch_refuses_other_names_of_the_backend() -> None:
    words = "Invalid backend: 'runlora_fx', see `torch._dynamo.list_backends()`"
    with pytest.raises(InvalidBackend, match=re.escape(words)):
        torch.compile(Net(), backend="runlora_fx")
    assert _documented(words)


def test_torch_refuses_a_mode_beside_options() -> None:
    words = "Either mode or options can be specified, but both can't be specified at the same time."
    with pytest.raises(RuntimeError, match=re.escape(words)):
        torch.compile(Net(), backend=RUNLORA, mode="default", options={"runlora.memory": "low"})
    assert _documented(words)


def test_names_in_state_dicts(model: PeftModel) -> None:
    names = list(model.state_dict())
    wrapped = torch.compile(model, backend=RUNLORA_EAGER)
    assert isinstance(wrapped, nn.Module)
    assert list(wrapped.state_dict()) == [f"_orig_mod.{name}" for name in names]
    plain = {name.removeprefix("_orig_mod."): t for name, t in wrapped.state_dict().items()}
    model.load_state_dict(plain)
    model.compile(backend=RUNLORA_EAGER)
    assert list(model.state_dict()) == names


# --- machines

COMPILED = """
import torch
torch.compile(lambda x: torch.relu(x) + 1, backend="runlora")(torch.randn(8, 8))
"""


def test_no_compiler() -> None:
    done = python(
        *("-c", COMPILED),
        CXX="/nonexistent",
        PATH="",
        TORCHINDUCTOR_FORCE_DISABLE_CACHES="1",
    )
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("RuntimeError: ")]
    words = "Inductor finds no C++ compiler, which it needs to compile for the CPU."
    assert line.startswith(f"RuntimeError: {words} Install one ")
    assert "use backend='runlora_eager', which needs none" in line
    assert _documented(words)


@pytest.mark.parametrize("use", ("import runlora_fx", "import runlora_fx.backend"))
def test_a_torch_that_is_too_old(use: str) -> None:
    done = python("-c", f"import torch; torch.__version__ = '2.10.1+cpu'; {use}")
    assert done.returncode != 0
    words = "runlora-fx needs torch 2.11 or newer; torch 2.10.1+cpu is installed"
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: {words}: pip install --upgrade 'torch>=2.11'"
    )
    assert _documented(words)
