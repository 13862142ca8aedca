"""Output of the demo: tables of loss curves, times and memory.

Example: ``sparkline([3.0, 2.0, 1.0], 1.0, 3.0)`` is ``"█▅▁"``.

Invariant: nothing here runs a model; only measured numbers are printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean, median

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from runlora_fx.cli.demo_training import Settings, Variant
from runlora_fx.cost_model.devices.peak import peak_source

BARS = "▁▂▃▄▅▆▇█"


def headline(model: nn.Module, settings: Settings, device: torch.device) -> str:
    """One line on what is fine-tuned, and where."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name = settings.model or "a small random Llama"
    return (
        f"Fine-tuning {name}: {total / 1e6:.1f} M parameters, {trained / 1e6:.2f} M in adapters of "
        f"rank {settings.rank}; {settings.batch} x {settings.seq} tokens a step, {settings.dtype}, "
        f"{device}"
    )


def print_losses(
    console: Console, variants: Sequence[Variant], reference: Variant, tolerance: float
) -> bool:
    """Print the loss curves.

    Args:
        console: Where to.
        variants: With the losses of all steps.
        reference: The variant that the others are compared with.
        tolerance: Largest relative difference that counts as equal.

    Returns:
        True if every variant but eager follows the reference.
    """
    table = Table(title=f"Loss of {len(reference.losses)} steps")
    for name in ("", "first", "curve", "last", f"difference to {reference.name}"):
        table.add_column(name, justify="right" if name in ("first", "last") else "left")
    lowest = min(min(variant.losses) for variant in variants)
    highest = max(max(variant.losses) for variant in variants)
    worst = 0.0
    for variant in variants:
        pairs = zip(variant.losses, reference.losses, strict=True)
        difference = max(abs(mine - theirs) / theirs for mine, theirs in pairs)
        if variant.name != "eager":
            worst = max(worst, difference)
        table.add_row(
            variant.name,
            f"{variant.losses[0]:.4f}",
            sparkline(variant.losses, lowest, highest),
            f"{variant.losses[-1]:.4f}",
            "-" if variant is reference else f"{difference:.0e}",
        )
    console.print(table)
    if reference.name != "eager":
        console.print("With dropout, eager mode and compiled code draw different masks.")
    equal = worst <= tolerance
    verdict = "The curves are equal" if equal else "[bold red]The curves differ[/]: not"
    console.print(f"{verdict} within {tolerance:g}.\n")
    return equal


def print_costs(console: Console, variants: Sequence[Variant], device: torch.device) -> None:
    """Print time per step, ratios of times, the activations saved for the backward, peak memory.

    A ratio is the median of the ratios of single steps. Other work on the machine disturbs it less
    than a ratio of medians.
    """
    named = {variant.name: variant for variant in variants}
    table = Table(title=f"Cost of a training step, median of {len(variants[0].seconds)}")
    for name in ("", "time", "/ eager", "/ inductor", "saved", "peak", "first step"):
        table.add_column(name, justify="right" if name else "left")
    for variant in variants:
        table.add_row(
            variant.name,
            f"{median(variant.seconds) * 1e3:.1f} ms",
            f"{_time_ratio(variant, named['eager']):.3f}",
            f"{_time_ratio(variant, named['inductor']):.3f}",
            f"{variant.saved_bytes / 2**20:.1f} MiB",
            f"{variant.peak_bytes / 2**20:.1f} MiB",
            f"{variant.first_seconds:.1f} s",
        )
    console.print(table)
    source = peak_source(device)
    console.print(f"Peak: the most that a step holds beyond what was held before it, by {source}.")


def _time_ratio(variant: Variant, other: Variant) -> float:
    """Median over the steps of one variant's time over another's."""
    pairs = zip(variant.seconds, other.seconds, strict=True)
    return median(mine / theirs for mine, theirs in pairs)


def sparkline(values: Sequence[float], lowest: float, highest: float, width: int = 20) -> str:
    """A curve in one line of text.

    Args:
        values: The curve.
        lowest: Value of the lowest bar.
        highest: Value of the highest bar.
        width: Bars at most; each is the mean of its share of the values.

    Returns:
        The bars, from left to right.
    """
    bars = min(width, len(values))
    edges = [len(values) * i // bars for i in range(bars + 1)]
    means = [mean(values[a:b]) for a, b in pairwise(edges)]
    unit = (highest - lowest) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((value - lowest) / unit)] for value in means)
