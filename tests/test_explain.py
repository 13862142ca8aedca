"""`explain` and `joint_graph`: the options they take, and that nothing is left of their look."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from market import randomise_lora_b
from peft import LoraConfig, get_peft_model
from torch import Tensor, fx, nn
from torch._dynamo import convert_frame
from torch._dynamo.utils import counters

import runlora_fx
from runlora_fx._torch_compat import APART

TOKENS, IN, OUT, RANK = 96, 16, 24, 2


class Lora(nn.Module):
    """A linear layer with an adapter; ``memory`` is an argument of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(IN, OUT, bias=False)
        self.down = nn.Linear(IN, RANK, bias=False)
        self.up = nn.Linear(RANK, OUT, bias=False)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return factor * (self.base(x) + self.up(self.down(x)))


class Wrapped(nn.Module):
    """Takes any keyword, as PEFT's models do, and passes it on."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Lora()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.model(*args, **kwargs)


class Anything(nn.Module):
    """Reads keywords that it does not name."""

    def __init__(self) -> None:
        super().__init__()
        self.lora = Lora()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.lora(x) * kwargs.get("scale", 1.0) + kwargs.get("memory_bias", 0.0)


class Decoder(nn.Module):
    """Names an argument as we name an option."""

    def __init__(self) -> None:
        super().__init__()
        self.lora = Lora()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.lora(x) + memory


@pytest.fixture(autouse=True)
def _compile_anew() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def activation(tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, IN)


def is_changed(report: runlora_fx.Report) -> bool:
    (site,) = report.sites
    return site.changed


# --- options


@pytest.mark.parametrize("make", (Lora, Wrapped, Anything))
def test_explain_takes_options_and_arguments_of_the_model(make: type[nn.Module]) -> None:
    model, x = make(), activation()
    assert is_changed(runlora_fx.explain(model, x, objective="flops"))
    assert not is_changed(runlora_fx.explain(model, x=x, objective="flops", margin=0.5))
    assert not is_changed(runlora_fx.explain(model, x, **{"runlora.margin": 0.5}))


def test_explain_passes_the_models_own_keywords_on() -> None:
    assert is_changed(runlora_fx.explain(Lora(), x=activation(), factor=2.0, objective="flops"))
    assert is_changed(runlora_fx.explain(Wrapped(), activation(), factor=2.0, objective="flops"))
    bias = torch.ones(OUT)
    report = runlora_fx.explain(Anything(), activation(), scale=2.0, memory_bias=bias)
    assert len(report.sites) == 1


def test_a_name_that_both_know_is_the_models() -> None:
    memory = torch.ones(OUT)
    runlora_fx.explain(Decoder(), activation(), memory=memory)
    runlora_fx.explain(Decoder(), activation(), memory=memory, **{"runlora.memory": "low"})
    with pytest.raises(ValueError, match=r"runlora\.memory must be"):
        runlora_fx.explain(Decoder(), activation(), memory=memory, **{"runlora.memory": "lo"})


@pytest.mark.parametrize("make", (Lora, Wrapped, Anything))
def test_a_misspelt_option_is_refused(make: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="memroy") as caught:
        runlora_fx.explain(make(), activation(), memroy="low")
    assert "Did you mean memory?" in str(caught.value)
    assert "Valid options: strict, objective, " in str(caught.value)


def test_an_unknown_keyword_of_a_model_that_takes_few_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown option nonsense"):
        runlora_fx.explain(Lora(), activation(), nonsense=1)


def test_a_misspelt_option_next_to_the_batch_of_a_peft_model_is_refused() -> None:
    layers = nn.Sequential(nn.Linear(IN, OUT), nn.GELU())
    model = get_peft_model(layers, LoraConfig(r=RANK, target_modules=["0"]))
    randomise_lora_b(model)
    assert is_changed(runlora_fx.explain(model, activation(), objective="flops"))
    with pytest.raises(ValueError, match="objectives"):
        runlora_fx.explain(model, activation(), objectives="flops")


# --- nothing is left

LOOKS: dict[str, Callable[[Callable[..., Any], Tensor], object]] = {
    "explain": lambda model, x: runlora_fx.explain(model, x),
    "joint_graph": lambda model, x: runlora_fx.joint_graph(model, [x]),
}
every_look = pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)


def compiled(model: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    """Compile, and list the shapes of the graphs' first floating inputs."""

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        (x,) = (n for n in gm.graph.nodes if n.op == "placeholder" and "x" in n.name)
        seen.append(str(tuple(x.meta["example_value"].shape)))
        return gm.forward

    return torch.compile(model, backend=backend)


@every_look
def test_no_size_becomes_symbolic(look: Callable[..., object]) -> None:
    model, seen = Lora(), list[str]()
    look(model, activation(8))
    look(model, activation(16))
    compiled(model, seen)(activation(77))
    assert seen == [f"(77, {IN})"]


@every_look
def test_sizes_that_the_user_compiled_are_remembered(look: Callable[..., object]) -> None:
    model, seen = Lora(), list[str]()
    run = compiled(model, seen)
    run(activation(8))
    look(model, activation(16))
    look(model, activation(24))
    run(activation(8))
    assert seen == [f"(8, {IN})"]
    run(activation(32))
    assert len(seen) == 2  # the second size: now Dynamo makes it symbolic
    run(activation(64))
    assert len(seen) == 2


@every_look
def test_statistics_are_those_of_before(look: Callable[..., object]) -> None:
    model = Lora()
    compiled(model, [])(activation())
    counted = {name: dict(counter) for name, counter in counters.items()}
    frames = convert_frame.FRAME_COUNTER
    look(model, activation(16))
    look(Lora(), activation())
    assert {name: dict(counter) for name, counter in counters.items()} == counted
    assert frames == convert_frame.FRAME_COUNTER


def test_a_graph_break_leaves_no_statistics() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x.sin()
        torch._dynamo.graph_break()
        return x.cos()

    counters.clear()
    runlora_fx.explain(broken, activation())
    assert not counters["graph_break"]
    with pytest.raises(RuntimeError):
        runlora_fx.joint_graph(broken, [activation()])
    assert not counters["stats"]


@every_look
def test_compiled_code_is_thrown_away(look: Callable[..., object]) -> None:
    model = Lora()
    look(model, activation())
    entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(Lora.forward.__code__)
    assert entries == []


@pytest.mark.skipif(not APART, reason="before torch 2.13 a second look counts as a recompilation")
@every_look
def test_the_recompile_limit_is_the_users(look: Callable[..., object]) -> None:
    model, seen = Lora(), list[str]()
    run = compiled(model, seen)
    run(activation(8))
    for tokens in range(16, 16 + 2 * torch._dynamo.config.recompile_limit):
        look(model, activation(tokens))
    run(activation(9))
    run(activation(10))
    assert len(seen) == 2
