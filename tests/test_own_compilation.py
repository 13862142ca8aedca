"""Substitutes for functions of PEFT act in our own compilations, and in no others."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._inductor.config as inductor_config
from checks import INDUCTOR, RUNLORA, RUNLORA_EAGER
from torch import Tensor

import runlora_fx
from runlora_fx import backend
from runlora_fx.integrations.own_compile import VARIABLE, is_own_compilation

AOT_EAGER = "aot_eager"

# What Dynamo makes of training steps under some backends, one after the other, in a new process.
SCRIPT = """
import json, sys
before, models, backends = json.loads(sys.argv[1])
if before:
    import runlora_fx
assert ("runlora_fx" in sys.modules) == before
import torch
from mixtures import SMALL, adapted, batch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

def make(model):
    if model == "experts":
        return adapted("mixtral", "batched_mm")
    llama = LlamaForCausalLM(LlamaConfig(intermediate_size=96, **SMALL))
    return get_peft_model(llama, LoraConfig(use_dora=True, target_modules=["q_proj", "v_proj"]))

found = {}
for model in models:
    found[model] = []
    for backend in backends:
        torch._dynamo.reset()
        counters.clear()
        run = torch.compile(make(model), backend=backend)
        for _ in range(2):
            run(**batch()).loss.backward()
        breaks = sorted(map(list, counters["graph_break"].items()))
        stats = counters["stats"]
        found[model].append([stats["unique_graphs"], stats["calls_captured"], breaks])
assert ("runlora_fx" in sys.modules) == (before or backends != ["aot_eager"])
print("RESULT", json.dumps(found))
"""


class Work(NamedTuple):
    """What Dynamo made of a training step."""

    graphs: int
    calls: int
    breaks: list[Any]


@cache
def works(
    models: tuple[str, ...], *backends: str, imported: bool = True, substitutes: str = "1"
) -> dict[str, list[Work]]:
    """By model, the work under each backend."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([imported, models, backends])],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            VARIABLE: substitutes,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    found = json.loads(line.removeprefix("RESULT "))
    return {model: [Work(*work) for work in works] for model, works in found.items()}


@pytest.mark.parametrize("model", ("dora", pytest.param("experts", marks=pytest.mark.slow)))
def test_other_backends_trace_a_model_as_without_us(model: str) -> None:
    """Although we are imported, and the same model was compiled with our backend before."""
    (wanted,) = works((model,), AOT_EAGER, imported=False)[model]
    assert wanted.graphs > 1
    ours, others = works((model,), RUNLORA_EAGER, AOT_EAGER)[model]
    assert others == wanted
    assert (ours.graphs, ours.breaks) == (1, [])


def test_substitutes_can_be_switched_off() -> None:
    ours = works(("dora",), RUNLORA_EAGER, substitutes="0")["dora"]
    assert ours == works(("dora",), AOT_EAGER, imported=False)["dora"]


# --- whose compilation it is


def power(x: Tensor) -> Tensor:
    """The square in our own compilations, else the cube; Inductor has nothing to compile."""
    return x @ x if is_own_compilation() else x @ x @ x


OURS: dict[str, Any] = {
    "runlora": {"backend": RUNLORA},
    "runlora with options": {"backend": RUNLORA, "options": {"runlora.margin": 0.1}},
    "runlora with a mode": {"backend": RUNLORA, "mode": "max-autotune-no-cudagraphs"},
    "runlora_eager": {"backend": RUNLORA_EAGER},
    "function": {"backend": backend.runlora_eager},
    "partial": {"backend": partial(backend.runlora_eager, options={"runlora.margin": 0.1})},
    "pass as an option": {
        "backend": INDUCTOR,
        "options": {"joint_custom_pre_pass": runlora_fx.RunloraPass()},
    },
}
OTHERS: dict[str, Any] = {
    "eager": {"backend": "eager"},
    "aot_eager": {"backend": AOT_EAGER},
    "inductor": {"backend": INDUCTOR},
    "function": {"backend": lambda gm, _: gm.forward},
}


@pytest.fixture
def x() -> Tensor:
    torch._dynamo.reset()
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("settings", OURS.values(), ids=OURS)
def test_own_compilations(settings: dict[str, Any], x: Tensor) -> None:
    found = torch.compile(power, fullgraph=True, **settings)(x)
    torch.testing.assert_close(found, x @ x)


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_other_compilations(settings: dict[str, Any], x: Tensor) -> None:
    found = torch.compile(power, fullgraph=True, **settings)(x)
    torch.testing.assert_close(found, x @ x @ x)


def test_inductor_with_the_pass_set_globally_is_ours(x: Tensor) -> None:
    with inductor_config.patch(joint_custom_pre_pass=runlora_fx.RunloraPass()):
        torch.testing.assert_close(torch.compile(power, backend=INDUCTOR)(x), x @ x)


def test_eager_mode_is_nobodys(x: Tensor) -> None:
    torch.testing.assert_close(power(x), x @ x @ x)
    runlora_fx.explain(power, x)
    torch.testing.assert_close(power(x), x @ x @ x)


def test_compiled_code_of_one_backend_does_not_serve_another(x: Tensor) -> None:
    compiled: list[tuple[int, Callable[..., Tensor]]] = [
        (2 if name in (RUNLORA, RUNLORA_EAGER) else 3, torch.compile(power, backend=name))
        for name in (AOT_EAGER, RUNLORA_EAGER, RUNLORA)
    ]
    for exponent, run in compiled * 2:
        torch.testing.assert_close(run(x), torch.linalg.matrix_power(x, exponent))


def test_between_compiled_parts_it_is_still_ours(x: Tensor) -> None:
    seen: list[bool] = []

    @torch.compiler.disable(recursive=False)
    def look() -> None:
        seen.append(is_own_compilation())

    def broken(x: Tensor) -> Tensor:
        x = x @ x
        look()
        return x @ x

    for name in (RUNLORA_EAGER, AOT_EAGER):
        torch.compile(broken, backend=name)(x)
    broken(x)
    assert seen == [True, False, False]
