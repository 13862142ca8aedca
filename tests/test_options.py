"""Options: what is refused and how, what reaches Inductor, and what the documentation says."""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from checks import INDUCTOR, RUNLORA, RUNLORA_EAGER
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed

import runlora_fx
from runlora_fx import Options, RunloraPass

NAMES = [field.name for field in fields(Options)]
OPTIONS_MD = Path(__file__).parents[1] / "docs" / "options.md"

# x (tokens, in), w (out, in), a (rank, in), b (out, rank): merging w + b a saves a tenth. There are
# matrix products only, for which Inductor has nothing to compile.
RANDOM = torch.Generator().manual_seed(0)
INPUTS = [torch.randn(size, generator=RANDOM) for size in ((96, 16), (24, 16), (2, 16), (24, 2))]


def _lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x @ w.t() + x @ a.t() @ b.t()


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    """On a cache hit the pass would not run."""
    torch._dynamo.reset()
    with (
        inductor_config.patch(fx_graph_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield


def _compile(backend: str, **settings: Any) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(_lora, backend=backend, fullgraph=True, **settings)(*INPUTS)


def _compile_with(backend: str) -> Callable[..., object]:
    return lambda **ours: _compile(backend, options={f"runlora.{k}": v for k, v in ours.items()})


# Every way to give an option.
WAYS: dict[str, Callable[..., object]] = {
    "runlora": _compile_with(RUNLORA),
    "runlora_eager": _compile_with(RUNLORA_EAGER),
    "rewrite": lambda **ours: runlora_fx.rewrite(fx.symbolic_trace(_lora), INPUTS, **ours),
    "joint_graph": lambda **ours: runlora_fx.joint_graph(_lora, INPUTS, **ours),
}

# Values that are refused, by option, and the words that say what is valid.
INVALID: dict[str, tuple[list[object], str]] = {
    "strict": ([1, "yes", None], "True or False"),
    "objective": (["latency", "", None, ["flops"]], "'time', 'flops'"),
    "margin": ([1, 1.5, -0.1, float("nan"), True, "0.1", None], "a number in [0, 1)"),
    "tune": (["on", "", None, True], "'off', 'profile', 'shapes', 'plans'"),
    "memory": (["high", "", None, 1], "'balanced', 'low', 'fast'"),
    "memory_budget": ([-1, 0.5, "1", None, True], "a number of bytes, 0 or more"),
    "reuse": ([1, "yes", None], "True or False"),
    "numerics": (["exact", "", None, 0], "'default', 'strict', 'relaxed'"),
    "upcast": ([1, "yes", None], "True or False"),
    "device": (["h99", 1, None], "'h100', 'h200', 'a100'"),
}


def _refusal(way: str, **ours: object) -> str:
    """The message with which options are refused; Dynamo wraps what a backend raises."""
    with pytest.raises((ValueError, BackendCompilerFailed)) as caught:
        WAYS[way](**ours)
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, ValueError)
    assert str(error) in str(caught.value)
    return str(error)


# --- what is refused


def test_every_option_has_values_to_refuse() -> None:
    assert list(INVALID) == NAMES


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_invalid_value_is_refused(name: str, way: str) -> None:
    values, valid = INVALID[name]
    for value in values:
        message = _refusal(way, **{name: value})
        assert f"runlora.{name} must be" in message
        assert valid in message
        assert message.endswith(f"not {value!r}")


@pytest.mark.parametrize("way", WAYS)
def test_unknown_option_is_refused(way: str) -> None:
    message = _refusal(way, margins=0.1)
    prefix = "runlora." if way in (RUNLORA, RUNLORA_EAGER) else ""
    assert f"unknown option {prefix}margins." in message
    assert f"Did you mean {prefix}margin?" in message
    assert message.endswith("Valid options: " + ", ".join(prefix + name for name in NAMES))


@pytest.mark.parametrize("way", WAYS)
def test_unknown_option_without_a_likeness_gets_no_hint(way: str) -> None:
    assert "Did you mean" not in _refusal(way, nonsense=1)


@pytest.mark.parametrize("way", WAYS)
def test_an_option_reaches_the_pass(way: str) -> None:
    for margin, changed in ((0.0, True), (0.5, False)):
        WAYS[way](margin=margin, strict=True)
        report = runlora_fx.last_report()
        assert report is not None
        (site,) = report.sites
        assert site.changed == changed
    assert "margin (50.0%)" in site.reason


def test_documented_options_and_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", OPTIONS_MD.read_text(), re.MULTILINE)
    assert {name: ast.literal_eval(default) for name, default in rows} == asdict(Options())


# --- Inductor's


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings that Inductor's `compile_fx` is called with; nothing is compiled."""
    calls: list[dict[str, Any]] = []

    def compile_fx(
        gm: fx.GraphModule, _: Any, config_patches: dict[str, Any], **__: Any
    ) -> Callable[..., Any]:
        calls.append(dict(config_patches))
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return calls


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mode": "default"},
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"max_autotune": True, "cpp.simdlen": 1, "epilogue-fusion": False}},
    ],
    ids=str,
)
def test_inductor_gets_what_it_gets_without_us(
    settings: dict[str, Any], given: list[dict[str, Any]]
) -> None:
    _compile(INDUCTOR, **settings)
    _compile(RUNLORA, **settings)
    inductors, ours = given
    assert isinstance(ours.pop("joint_custom_pre_pass"), RunloraPass)
    assert ours == inductors


def test_our_options_stand_next_to_inductors(given: list[dict[str, Any]]) -> None:
    _compile(RUNLORA, options={"runlora.margin": 0.5, "max_autotune": True})
    (settings,) = given
    # Equal identities: the pass was made with these options and no others.
    own_pass = settings.pop("joint_custom_pre_pass")
    assert own_pass.uuid() == RunloraPass(Options(margin=0.5)).uuid()
    assert settings == {"max_autotune": True}


def test_values_of_inductors_options_are_refused_in_its_own_words() -> None:
    options = {"max_autotune": "yes"}
    with pytest.raises(RuntimeError) as inductors:
        _compile(INDUCTOR, options=options)
    with pytest.raises(BackendCompilerFailed) as ours:
        _compile(RUNLORA, options=options)
    assert type(ours.value.inner_exception) is inductors.type
    assert str(ours.value.inner_exception) == str(inductors.value)


def test_runlora_eager_refuses_what_it_would_ignore() -> None:
    with pytest.raises(
        BackendCompilerFailed, match=r"runlora\.\* options only.*\['max_autotune'\]"
    ):
        _compile(RUNLORA_EAGER, options={"max_autotune": True, "runlora.margin": 0.5})
    with pytest.raises(BackendCompilerFailed, match="mode"):
        _compile(RUNLORA_EAGER, mode="max-autotune")


def test_settings_hold_inside_a_compilation_and_nowhere_else() -> None:
    inside: list[bool] = []

    def look(_: fx.Graph) -> None:
        inside.append(inductor_config.epilogue_fusion)

    with inductor_config.patch(joint_custom_pre_pass=look):
        before = inductor_config.get_config_copy()
        assert before["epilogue_fusion"]
        found = _compile(RUNLORA, options={"epilogue_fusion": False, "runlora.strict": True})
        torch.testing.assert_close(found, _lora(*INPUTS))
        assert inside == [False]
        assert inductor_config.get_config_copy() == before


def test_a_failed_compilation_leaves_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("runlora_fx.passes.planning.decide_all", fail)
    before = inductor_config.get_config_copy()
    with pytest.raises(BackendCompilerFailed, match="out of luck"):
        _compile(RUNLORA, options={"epilogue_fusion": False, "runlora.strict": True})
    assert inductor_config.get_config_copy() == before


def test_the_pass_alone_serves_libraries_that_know_inductor_only() -> None:
    with inductor_config.patch(joint_custom_pre_pass=RunloraPass(Options(strict=True))):
        torch.testing.assert_close(_compile(INDUCTOR), _lora(*INPUTS))
    report = runlora_fx.last_report()
    assert report is not None
    assert [site.changed for site in report.sites] == [True]


def test_mode_lite_is_not_reported_as_a_cache_hit() -> None:
    """It switches Inductor's joint passes off: no graph is rewritten, and none is cached."""
    torch.testing.assert_close(_compile(RUNLORA, mode="lite"), _lora(*INPUTS))
    report = runlora_fx.last_report()
    assert report is not None
    assert not report.from_cache
    assert not report.sites
