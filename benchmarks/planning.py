"""What planning costs: CPU seconds against those of tracing, and the slowest problems.

    python benchmarks/planning.py [CASE ...]

takes a few minutes on 2 CPU cores; without names it runs all cases. The models have their real
numbers of layers and adapters and small widths: neither tracing nor planning depends on widths.

Before -> after: a model is traced and rewritten once, nothing of it is run; the tables say
how long either took, what the rewrite saves, and which problems took most of the effort.

*Tracing* is all that AOTAutograd does itself for the training graph: the joint trace with
Inductor's decompositions and functionalisation, and the cut of the graph as it came into forward
and backward. It holds neither the pass, which works on a copy, nor Dynamo, nor Inductor. *Planning*
is the whole pass with its report. *Share* is planning over tracing. Dynamo has a column of its own.
A small model is traced and rewritten first, so that neither holds the imports of the first time.

Invariant: *effort* counts the search's work, so that it is the same on every machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import HRAConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from transformers import AlbertConfig, AlbertModel, LlamaConfig, LlamaForCausalLM

from runlora_fx.cost_model.objective import Objective
from runlora_fx.joint_pass import run
from runlora_fx.options import Options
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.search import dynamic
from runlora_fx.passes.search.decide import Decision
from runlora_fx.report.data import Report

ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WIDTH, HEADS, ROWS, LENGTH, VOCAB = 64, 4, 2, 96, 96
SLOWEST = 12


def llama(layers: int) -> LlamaForCausalLM:
    """A Llama of small width."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def adapted(base: nn.Module, config: Any) -> nn.Module:
    """The model with adapters of which nothing is zero."""
    model = get_peft_model(base, config)  # type: ignore[arg-type]
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.02)
    return model.train()


class Calls(nn.Module):
    """One model, called several times on different tokens in one graph."""

    def __init__(self, model: nn.Module, calls: int) -> None:
        """Wrap a model."""
        super().__init__()
        self.model, self.calls = model, calls

    def forward(self, tokens: Tensor) -> Tensor:
        """The sum of what the calls return."""
        outputs = [self.model(tokens + i).logits for i in range(self.calls)]
        return torch.stack(outputs).sum()


class Loop(nn.Module):
    """``for _ in range(k): x = gelu(x W' + 2 (x A') B')``."""

    def __init__(self, times: int) -> None:
        """Make one layer."""
        super().__init__()
        self.times = times
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8, requires_grad=False)
        self.a = nn.Parameter(torch.randn(8, WIDTH) / 8)
        self.b = nn.Parameter(torch.randn(WIDTH, 8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer some times."""
        for _ in range(self.times):
            x = torch.nn.functional.gelu(x @ self.w.T + 2 * (x @ self.a.T @ self.b.T))
        return x


class Siamese(nn.Module):
    """One encoder of two adapted layers for two inputs."""

    def __init__(self) -> None:
        """Make the encoder."""
        super().__init__()
        self.one, self.two = Loop(1), Loop(1)

    def forward(self, x: Tensor) -> Tensor:
        """The product of both codes."""
        left, right = (self.two(self.one(half)) for half in (x, x.flip(0)))
        return left * right


def albert(layers: int) -> nn.Module:
    """An ALBERT: all layers have the same weights."""
    config = AlbertConfig(
        vocab_size=VOCAB,
        embedding_size=32,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
    )
    targets = ["query", "key", "value", "dense", "ffn", "ffn_output"]
    return adapted(AlbertModel(config), LoraConfig(r=4, target_modules=targets))


def tokens() -> Tensor:
    """Random token ids."""
    return torch.randint(3, VOCAB - 8, (ROWS, LENGTH))


def activations() -> Tensor:
    """Random activations that want a gradient."""
    return torch.randn(ROWS * LENGTH, WIDTH, requires_grad=True)


def lora(targets: Sequence[str] = ALL_SEVEN) -> LoraConfig:
    """LoRA of rank 4."""
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(targets))


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor]]

CASES: dict[str, Case] = {
    "Llama, 8 layers x 7 adapters": (lambda: adapted(llama(8), lora()), tokens),
    "Llama, 32 layers x 7 adapters": (lambda: adapted(llama(32), lora()), tokens),
    "VeRA on q and v": (
        lambda: adapted(llama(2), VeraConfig(r=8, target_modules=["q_proj", "v_proj"])),
        tokens,
    ),
    "HRA, r = 2, one layer": (
        lambda: adapted(llama(1), HRAConfig(r=2, target_modules=["q_proj"])),
        tokens,
    ),
    "OFT, Cayley-Neumann": (
        lambda: adapted(
            llama(1),
            OFTConfig(
                r=0,
                oft_block_size=16,
                target_modules=["q_proj", "v_proj"],
                use_cayley_neumann=True,
                module_dropout=0.0,
            ),
        ),
        tokens,
    ),
    "ALBERT, 12 layers": (lambda: albert(12), tokens),
    "Llama, 2 layers, called 4 times": (lambda: Calls(adapted(llama(2), lora()), 4), tokens),
    "siamese encoders": (Siamese, activations),
    **{f"loop, k = {k}": (lambda k=k: Loop(k), activations) for k in (1, 2, 4, 8, 12)},
}


@dataclass(frozen=True)
class Outcome:
    """What one case took and gained.

    Attributes:
        dynamo: Time of Dynamo, from the call of the model to the backend [CPU s].
        tracing: Time of AOTAutograd for the graph as it came, cutting it included [CPU s].
        planning: Time of the whole pass [CPU s].
        report: What it did.
        decisions: What it decided, for every kind of problem, and the time of it [CPU s].
    """

    dynamo: float
    tracing: float
    planning: float
    report: Report
    decisions: tuple[tuple[Decision, float], ...]


class _Stop(Exception):
    """The graph was seen: nothing is to be compiled or run."""


@contextmanager
def recorded() -> Iterator[list[tuple[Decision, float]]]:
    """Record all that is decided inside the block, equal problems once, and how long it takes."""
    found: dict[int, tuple[Decision, float]] = {}
    decide = dynamic.decide

    def timed(problem: Problem, objective: Objective) -> Decision:
        start = time.process_time()
        decision = decide(problem, objective)
        found.setdefault(id(decision), (decision, time.process_time() - start))
        return decision

    decided: list[tuple[Decision, float]] = []
    dynamic.decide = timed  # type: ignore[attr-defined, assignment]
    try:
        yield decided
    finally:
        dynamic.decide = decide  # type: ignore[attr-defined]
        decided.extend(found.values())


def measured(case: Case) -> Outcome:
    """Trace and rewrite a model once."""
    make, inputs = case
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, batch = make(), inputs()
    found: list[Outcome] = []
    called = started = apart = 0.0

    def partition(joint: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        nonlocal apart
        begun = time.process_time()
        copied = fx.GraphModule(joint, deepcopy(joint.graph))
        planned = time.process_time()
        with recorded() as decisions:
            report = run(copied.graph, ATEN, Options(objective="flops"), may_guard=True)
        took = time.process_time() - planned
        found.append(Outcome(0.0, 0.0, took, report, tuple(decisions)))
        apart = time.process_time() - begun
        return min_cut_rematerialization_partition(joint, *args, compiler="inductor", **kwargs)

    def compile_forward(gm: fx.GraphModule, _: Sequence[Any]) -> Any:
        dynamo, tracing = started - called, time.process_time() - started - apart
        found[0] = replace(found[0], dynamo=dynamo, tracing=tracing)
        raise _Stop

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        nonlocal started
        started = time.process_time()
        compiler = aot_autograd(
            fw_compiler=compile_forward,
            partition_fn=partition,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )
        return compiler(gm, example_inputs)

    called = time.process_time()
    try:
        torch.compile(model, backend=backend, fullgraph=True)(batch)
    except Exception:
        if not (found and found[0].tracing):
            raise
    return found[0]


def main() -> None:
    """Measure the cases that are asked for, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="parts of names of cases; all if none")
    wanted = parser.parse_args().cases
    slowest: list[tuple[str, Decision, float]] = []
    measured(CASES["loop, k = 1"])  # what is imported late is imported now
    print("| case | Dynamo [CPU s] | tracing [CPU s] | planning [CPU s] | share | FLOPs |")
    print("|---|---|---|---|---|---|")
    for name, case in CASES.items():
        if wanted and not any(part in name for part in wanted):
            continue
        found = measured(case)
        report = found.report
        change = report.flops_after / report.flops_before - 1
        print(
            f"| {name} | {found.dynamo:.2f} | {found.tracing:.2f} | {found.planning:.2f} "
            f"| {found.planning / found.tracing:.1%} | {change:+.2%} |",
            flush=True,
        )
        slowest += [(name, decision, took) for decision, took in found.decisions]
    print("\n| problem of | steps tried | proof | deciding [CPU s] |\n|---|---|---|---|")
    for name, decision, took in sorted(slowest, key=lambda row: -row[1].effort)[:SLOWEST]:
        print(f"| {name} | {decision.effort} | {decision.proof} | {took:.2f} |")


if __name__ == "__main__":
    main()
