"""What the memory policies hold and cost: four layers, trained and applied, against Inductor.

    python benchmarks/memory.py

takes some minutes on 2 CPU cores, and less on a GPU. All variants run in one process, in turn;
times are medians over the rounds, as ratios to Inductor's. It writes ``memory.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from measuring.run import kept_bytes
from measuring.turns import seconds, take_turns
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from runlora_fx.cost_model.devices.machine import key_of
from runlora_fx.cost_model.devices.peak import peak_bytes, peak_source
from runlora_fx.cost_model.devices.registry import fastest

LAYERS, WIDTH, RANK = 4, 768, 64
MIB = 1 << 20
BUDGET = LAYERS * WIDTH * WIDTH * 4
FAST = {"runlora.memory": "fast", "runlora.memory_budget": BUDGET}

Options = dict[str, object]

#: By what is run: dropout, tokens, whether it is trained, and the policies to compare.
CASES: dict[str, tuple[float, int, bool, dict[str, Options]]] = {
    "training": (0.0, 2048, True, {"balanced": {}, "low": {"runlora.memory": "low"}, "fast": FAST}),
    "training, dropout 0.1": (
        0.1,
        2048,
        True,
        {"balanced": {}, "low": {"runlora.memory": "low"}},
    ),
    "inference, 64 tokens": (
        0.0,
        64,
        False,
        {"balanced": {}, "fast, reuse": {**FAST, "runlora.reuse": True}},
    ),
}


class Residual(nn.Module):
    """``x + gelu(linear(norm(x)))``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for x (tokens, width)."""
        return x + nn.functional.gelu(self.linear(self.norm(x)))


def main() -> None:
    """Run all cases and write the table."""
    parser = argparse.ArgumentParser(description="Bytes and times of the memory policies.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--device", type=torch.device, default=fastest())
    given = parser.parse_args()
    device = given.device
    machine = key_of(device, "float32")
    lines = [
        f"{LAYERS} layers `x + gelu(linear(norm(x)))` of width {WIDTH}, rank {RANK}, fp32, "
        f"{machine.device}, {torch.get_num_threads()} threads, torch {machine.torch}. "
        f"Peak: the most that a step holds beyond what was held before it, by "
        f"{peak_source(device)}.",
        "",
        "| | policy | saved for the backward, MiB | peak, MiB | time / Inductor |",
        "|---|---|---|---|---|",
    ]
    for case, (dropout, tokens, trains, policies) in CASES.items():
        lines += rows(case, dropout, tokens, trains, policies, given.rounds, device)
    table = "\n".join(lines) + "\n"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "memory.md").write_text(table, encoding="utf-8")
    print(table)


def rows(
    case: str,
    dropout: float,
    tokens: int,
    trains: bool,
    policies: dict[str, Options],
    rounds: int,
    device: torch.device,
) -> list[str]:
    """The lines of one case."""
    torch._dynamo.reset()  # the variants of all cases are more than Dynamo keeps of one function
    x = torch.randn(tokens, WIDTH, device=device, requires_grad=trains)
    steps: dict[str, Callable[[], None]] = {}
    held, peak = {}, {}
    for name, options in {"Inductor": None, **policies}.items():
        model = model_of(dropout).to(device)
        steps[name] = step = step_of(model, x, options, trains)
        step()
        step()
        held[name] = kept_bytes(partial(model, x), (*model.parameters(), x)) if trains else 0
        peak[name] = peak_bytes(step, device)
    times = take_turns({n: partial(seconds, step, device) for n, step in steps.items()}, rounds)
    inductor = median(times["Inductor"])
    return [
        f"| {case} | {name} | {held[name] / MIB:.1f} | {peak[name] / MIB:.1f} "
        f"| {median(times[name]) / inductor:.2f} |"
        for name in steps
    ]


def model_of(dropout: float) -> nn.Module:
    """The adapted model; B is small, but not zero."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(Residual() for _ in range(LAYERS)))
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=dropout, target_modules=["linear"])
    model: nn.Module = get_peft_model(layers, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.02)
    return model


def step_of(
    model: nn.Module, x: Tensor, options: Options | None, trains: bool
) -> Callable[[], None]:
    """A training step, or a forward."""
    # Compiled in place: every variant has a cache of its own.
    backend = "inductor" if options is None else "runlora"
    model.compile(backend=backend, dynamic=False, options=dict(options or {}))

    def train() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    def infer() -> None:
        with torch.no_grad():
            model(x)

    return train if trains else infer


if __name__ == "__main__":
    main()
