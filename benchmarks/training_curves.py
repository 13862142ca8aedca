"""Do the numerics policies change what a model learns? A small Llama, trained under each.

A two-layer Llama with random weights and PEFT adapters (rank 32) is fine-tuned on the text that
Python's ``help()`` reads, in three precisions: fp32, bf16, and a bf16 base with fp32 adapters as
PEFT makes them (without autocast). Every variant starts from the same adapters and sees the same
batches as eager PEFT with the same seed; the spread of eager over the seeds is the yardstick.

    python benchmarks/training_curves.py

takes about 40 minutes on one CPU core. It writes ``training_curves.json``, ``.md`` and, where
matplotlib is installed, ``.svg``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import peft
import torch
import transformers
from rich.progress import Progress
from torch import Tensor, nn

import runlora_fx
from runlora_fx.cli.demo_data import batches, corpus
from runlora_fx.cost_model.devices.machine import key_of

BATCH, SEQUENCE, RANK = 2, 64, 32
EVAL_EVERY, EVAL_BATCHES = 50, 8
RATE = 2e-3

#: By precision, the variants that may differ: in fp32 the policies plan alike.
VARIANTS = {
    "fp32": ("eager", "inductor", "default"),
    "bf16": ("eager", "inductor", "strict", "default"),
    "bf16, fp32 adapters": ("eager", "inductor", "default", "relaxed"),
}
CURVES = dict[str, dict[str, list[dict[str, list[float]]]]]


def main() -> None:
    """Train all variants and write what was seen."""
    parser = argparse.ArgumentParser(description="Training curves under the numerics policies.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--precisions", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate")
    parser.add_argument("--name", default="training_curves", help="of the files that are written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    tokens = corpus()
    cut = len(tokens) * 9 // 10
    curves: CURVES = {}
    changed: dict[str, bool] = {}
    with Progress() as progress:
        chosen = {precision: VARIANTS[precision] for precision in given.precisions}
        runs = sum(map(len, chosen.values())) * given.seeds
        task = progress.add_task("training", total=runs)
        for precision, variants in chosen.items():
            curves[precision] = {}
            for variant in variants:
                model = model_of(precision)
                step = compiled(model, variant)
                curves[precision][variant] = []
                for seed in range(given.seeds):
                    run = trained(
                        model, step, tokens[:cut], tokens[cut:], seed, given.steps, given.rate
                    )
                    curves[precision][variant].append(run)
                    progress.advance(task)
                report = runlora_fx.last_report()
                if variant not in ("eager", "inductor") and report is not None:
                    changed[f"{precision}, {variant}"] = any(s.changed for s in report.sites)
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "steps": given.steps,
        "batch": BATCH,
        "sequence": SEQUENCE,
        "rank": RANK,
        "rate": given.rate,
    }
    machine = key_of(torch.device("cpu"), "float32")
    content = {"machine": machine._asdict(), **settings, "rewritten": changed, "curves": curves}
    (given.out / f"{given.name}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    table = summary(curves, changed, settings, machine.device)
    (given.out / f"{given.name}.md").write_text(table, encoding="utf-8")
    plot(curves, given.out / f"{given.name}.svg")
    print(table)


def model_of(precision: str) -> nn.Module:
    """The model, with adapters in the precision's dtype."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQUENCE,
        initializer_range=0.05,
    )
    base = transformers.LlamaForCausalLM(config)
    base = base.to(torch.float32 if precision == "fp32" else torch.bfloat16)
    base.config.use_cache = False
    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    model: nn.Module = peft.get_peft_model(base, lora, autocast_adapter_dtype=precision != "bf16")
    return model.train()


def compiled(model: nn.Module, variant: str) -> Callable[..., Any]:
    """The model as a variant runs it; our plans are those with the fewest FLOPs."""
    torch._dynamo.reset()
    if variant == "eager":
        return model
    ours = {"runlora.numerics": variant, "runlora.objective": "flops", "runlora.strict": True}
    is_ours = variant != "inductor"
    backend = "runlora" if is_ours else "inductor"
    options: Any = ours if is_ours else None
    return torch.compile(model, backend=backend, dynamic=False, options=options)


def trained(
    model: nn.Module,
    run: Callable[..., Any],
    text: Tensor,
    held_out: Tensor,
    seed: int,
    steps: int,
    rate: float = RATE,
) -> dict[str, list[float]]:
    """Losses of a training from fresh adapters: of every step, and on held-out text."""
    adapters = [p for p in model.parameters() if p.requires_grad]
    reset(model, seed)
    optimizer = torch.optim.AdamW(adapters, lr=rate)
    data = batches(text, BATCH, SEQUENCE, seed=seed)
    losses, evaluations = [], []
    for step in range(1, steps + 1):
        batch = next(data)
        loss = run(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
        if step % EVAL_EVERY == 0 or step == steps:
            evaluations.append(round(evaluated(model, held_out), 5))
    # Of a smaller rate, the noise of a batch may hide it.
    if rate >= RATE and not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss did not fall: {losses[0]} -> {losses[-1]}")
    return {"training": losses[::5], "evaluation": evaluations}


@torch.no_grad()
def reset(model: nn.Module, seed: int) -> None:
    """Fresh adapters in the memory of the old: A random, B zero, as PEFT begins."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            bound = weight.shape[1] ** -0.5
            weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * bound)
        elif "lora_B" in name:
            weight.zero_()


@torch.no_grad()
def evaluated(model: nn.Module, held_out: Tensor) -> float:
    """The loss on held-out text, always in eager mode: what the adapters have learnt."""
    data = batches(held_out, BATCH, SEQUENCE, seed=0)
    chosen = [next(data) for _ in range(EVAL_BATCHES)]
    return mean(model(input_ids=batch, labels=batch).loss.item() for batch in chosen)


def summary(
    curves: CURVES, changed: dict[str, bool], settings: dict[str, float], machine: str
) -> str:
    """A table of the losses after training."""
    seeds = len(next(iter(next(iter(curves.values())).values())))
    lines = [
        f"{settings['steps']} steps of {BATCH} x {SEQUENCE} tokens, rank {RANK}, learning rate "
        f"{settings['rate']:g}, {machine}, torch "
        f"{torch.__version__}. Loss on held-out text after training; differences are to eager PEFT "
        f"with the same seed, over {seeds} seeds, with the standard error of their mean; the "
        "spread is eager's standard deviation over the seeds.",
        "",
        "| precision | variant | rewritten | loss | difference, mean | largest | eager's spread |",
        "|---|---|---|---|---|---|---|",
    ]
    for precision, variants in curves.items():
        eager = [run["evaluation"][-1] for run in variants["eager"]]
        spread = stdev(eager) if len(eager) > 1 else 0.0
        for variant, runs in variants.items():
            final = [run["evaluation"][-1] for run in runs]
            differences = [a - b for a, b in zip(final, eager, strict=True)]
            error = stdev(differences) / sqrt(len(differences)) if len(differences) > 1 else 0.0
            rewritten = {True: "yes", False: "no"}.get(
                changed.get(f"{precision}, {variant}"),  # type: ignore[arg-type]
                "",
            )
            lines.append(
                f"| {precision} | {variant} | {rewritten} | {mean(final):.4f} "
                f"| {mean(differences):+.4f} +- {error:.4f} | {max(map(abs, differences)):.4f} "
                f"| {spread:.4f} |"
            )
    return "\n".join(lines) + "\n"


def plot(curves: CURVES, path: Path) -> None:
    """The training losses, averaged over the seeds, with the range of eager's."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    pyplot.rcParams["svg.hashsalt"] = "runlora"
    figure, panels = pyplot.subplots(
        1, len(curves), figsize=(3 + 3 * len(curves), 3.5), sharey=True, squeeze=False
    )
    for panel, (precision, variants) in zip(panels[0], curves.items(), strict=True):
        for variant, runs in variants.items():
            rows = list(zip(*(run["training"] for run in runs), strict=True))
            steps = [5 * i for i in range(len(rows))]
            if variant == "eager":
                panel.fill_between(
                    steps,
                    list(map(min, rows)),
                    list(map(max, rows)),
                    alpha=0.2,
                    label="eager, range",
                )
            panel.plot(steps, list(map(mean, rows)), label=variant, linewidth=1)
        panel.set(title=precision, xlabel="step")
        panel.legend(fontsize=7)
    panels[0][0].set_ylabel("training loss")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
