"""The recipes of `docs/integrations.md`, run literally, and what Dynamo did for them.

A recipe runs three times: eagerly, under Inductor and under runlora. Its code is that of the
documentation; only the name of the backend differs, and eagerly nothing is compiled at all.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checks import INDUCTOR, RUNLORA, RUNLORA_EAGER, assert_same_values, counting, scalar_kernels
from market import lora_layers, randomise_lora_b
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics
from transformers import LlamaConfig, LlamaForCausalLM

import runlora_fx
from runlora_fx import history

EAGER = "eager"
REAL, FAST = (RUNLORA, INDUCTOR), (RUNLORA_EAGER, "aot_eager")
DOCUMENT = Path(__file__).parent.parent / "docs" / "integrations.md"
RECIPES: dict[str, str] = dict(
    re.findall(
        r"^<!-- run: (\w+) -->\n```python\n(.*?)^```",
        DOCUMENT.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
)

WIDTH, FFN, HEADS, VOCAB, TOKENS = 32, 64, 4, 64, 24


def run_recipe(name: str, backend: str, **given: Any) -> dict[str, Any]:
    """Run a block of the documentation.

    Args:
        name: What its comment `<!-- run: NAME -->` says.
        backend: Takes the place of "runlora" in it.
        **given: The names that it takes for granted.

    Returns:
        All names after it.
    """
    code = compile(RECIPES[name].replace('"runlora"', f'"{backend}"'), f"recipe {name}", "exec")
    names = dict(given)
    exec(code, names)
    return names


# --- models and data


def tiny_llama(layers: int = 1, **config: Any) -> LlamaForCausalLM:
    """A Llama of width 32; two calls return equal weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": 2 * TOKENS,
        "initializer_range": WIDTH**-0.5,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))


def adapted(base: nn.Module, **lora: Any) -> Any:
    """A PEFT model with adapters on all linear layers, none of them zero."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    model = get_peft_model(base, LoraConfig(**settings))
    randomise_lora_b(model)
    return model


def tokens(rows: int = 2, *, seed: int = 0, length: int = TOKENS) -> Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what is trained, by name."""
    named = model.named_parameters()
    return {name: weight.detach().clone() for name, weight in named if weight.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients, by name."""
    named = model.named_parameters()
    return {f"grad {n}": weight.grad.clone() for n, weight in named if weight.grad is not None}


def train(model: nn.Module, batch: Mapping[str, Tensor], steps: int = 2) -> dict[str, Tensor]:
    """Losses and first gradients of some steps of AdamW, and the parameters after them."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    values = {}
    for step in range(steps):
        loss = model(**batch).loss
        loss.backward()
        values[f"loss {step}"] = loss.detach()
        if step == 0:
            values |= gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return values | trainable(model)


# --- counting


@dataclass(frozen=True)
class Work:
    """What Dynamo did, independent of the backend.

    Attributes:
        graphs: Graphs handed to the backend.
        breaks: Graph breaks.
        recompiles: Compilations of code that had been compiled before.
    """

    graphs: int
    breaks: int
    recompiles: int


class Watch:
    """Resets Dynamo, and counts its work from then on."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        counters.clear()
        clear_compilation_metrics()

    def work(self) -> Work:
        """The work since then."""
        metrics = get_compilation_metrics()
        assert len(metrics) < 64, "older compilations are forgotten"
        return Work(
            graphs=counters["stats"]["unique_graphs"],
            breaks=sum(counters["graph_break"].values()),
            recompiles=sum(bool(compiled.recompile_reason) for compiled in metrics),
        )


@dataclass(frozen=True)
class Outcome:
    """A run under one backend.

    Attributes:
        values: What the run returned.
        work: What Dynamo did.
        flops: Matmul FLOPs of all graphs compiled [FLOP].
        reports: The reports of the pass, one for every graph.
    """

    values: dict[str, Tensor] = field(repr=False)
    work: Work
    flops: int
    reports: list[runlora_fx.Report] = field(repr=False)

    @property
    def modules(self) -> set[str]:
        """Names of the modules at the sites that were found."""
        return {name for report in self.reports for site in report.sites for name in site.modules}


Run = Callable[[str], dict[str, Tensor]]


@scalar_kernels
def outcome(run: Run, backend: str) -> Outcome:
    """Run with a backend and count; `EAGER` compiles nothing."""
    watch = Watch()
    stance = "force_eager" if backend == EAGER else "default"
    with torch.compiler.set_stance(stance), counting() as flops, history.collecting() as reports:
        values = run(backend)
    return Outcome(values, watch.work(), sum(flops), reports)


def check(
    run: Run,
    rtol: float = 1e-4,
    *,
    backends: tuple[str, str] = REAL,
    reference: str = EAGER,
) -> tuple[Outcome, Outcome]:
    """Require eager's values, Inductor's graphs, breaks and recompiles, and no more FLOPs.

    Args:
        run: Runs something with a given backend, from the same state every time.
        rtol: Relative error allowed. Adam divides gradients by their size, so the rounding of a
            gradient near zero shows in the parameters.
        backends: Ours and what it is compared with: `REAL` or, without code generation, `FAST`.
        reference: The backend with the right values; not eager mode where random numbers differ.

    Returns:
        Ours and the other's.
    """
    ours, other = (outcome(run, backend) for backend in backends)
    wanted = other if reference == backends[1] else outcome(run, reference)
    assert wanted.values
    assert_same_values(ours.values, wanted.values, rtol)
    assert ours.work == other.work
    assert ours.flops <= other.flops
    for report in ours.reports:
        # The user merges or disables adapters in some recipes.
        assert all(refusal.reason.startswith("adapters are ") for refusal in report.refusals)
        assert report.flops_after <= report.flops_before
    return ours, other


def assert_all_found(found: Outcome, model: nn.Module) -> None:
    """Require a site for every adapted layer, whichever part of its path is compiled."""
    named = {"." + name for name in found.modules}
    missed = {
        layer
        for layer in lora_layers(model)
        if not any(f".{layer}".endswith(name) or name.endswith(f".{layer}") for name in named)
    }
    assert not missed
