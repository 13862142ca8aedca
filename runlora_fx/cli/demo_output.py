"""What the demo prints: loss curves, costs, and the plan of every kind of layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import mean, median

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from runlora_fx.cli.demo_training import Settings, Variant
from runlora_fx.report.data import Report, Site

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
        reference: The variant that the others are held against.
        tolerance: Largest relative difference that counts as equal.

    Returns:
        Whether every variant but eager follows the reference.
    """
    table = Table(title=f"Loss of {len(reference.losses)} steps")
    for name in ("", "first", "curve", "last", f"off {reference.name} by"):
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
        console.print("With dropout, eager draws other masks than compiled code does.")
    equal = worst <= tolerance
    verdict = "The curves are equal" if equal else "[bold red]The curves differ[/]: not"
    console.print(f"{verdict} within {tolerance:g}.\n")
    return equal


def print_costs(console: Console, variants: Sequence[Variant]) -> None:
    """Print time per step, ratios of times, and the memory kept for the backward.

    A ratio is the median over the ratios within single steps, which a machine that is busy for a
    while disturbs less than a ratio of medians.
    """
    named = {variant.name: variant for variant in variants}
    table = Table(title=f"Cost of a training step, median of {len(variants[0].seconds)}")
    for name in ("", "time", "/ eager", "/ inductor", "kept for backward", "first step"):
        table.add_column(name, justify="right" if name else "left")
    for variant in variants:
        table.add_row(
            variant.name,
            f"{median(variant.seconds) * 1e3:.1f} ms",
            f"{_time_ratio(variant, named['eager']):.3f}",
            f"{_time_ratio(variant, named['inductor']):.3f}",
            f"{variant.saved_bytes / 2**20:.1f} MiB",
            f"{variant.first_seconds:.1f} s",
        )
    console.print(table)


def _time_ratio(variant: Variant, other: Variant) -> float:
    """Median over the steps of one variant's time over another's."""
    pairs = zip(variant.seconds, other.seconds, strict=True)
    return median(mine / theirs for mine, theirs in pairs)


def print_plans(console: Console, report: Report) -> None:
    """Print the algebra of every kind of layer, before and after; equal layers print once."""
    if not report.sites:
        console.print(f"\n{report}", markup=False)
        return
    kinds: dict[tuple[object, ...], list[Site]] = {}
    for site in report.sites:
        key = (site.shapes, site.before, site.after, site.changed, site.reason)
        kinds.setdefault(key, []).append(site)
    console.print("\n[bold]Plans[/]")
    for sites in kinds.values():
        site = sites[0]
        names = ranges(name for site in sites for name in site.modules)
        console.print(f"\n[bold]{escape(', '.join(names))}[/]  {escape(site.shapes)}")
        _print_algebra(console, "before", site.before, site.flops_before)
        if site.changed:
            _print_algebra(console, "after", site.after, site.flops_after)
        console.print(f"  why: {escape(site.reason)}")
    for refusal in report.refusals:
        where = ", ".join(ranges(refusal.nodes))
        console.print(f"\nleft alone: {escape(where)}: {escape(refusal.reason)}")
    console.print(
        f"\nAll matrix products of a step: {report.flops_before / 1e9:.2f} GFLOP before, "
        f"{report.flops_after / 1e9:.2f} GFLOP after."
    )


def _print_algebra(console: Console, label: str, algebra: str, flops: int) -> None:
    """Print the label with the FLOPs, then a value a line."""
    console.print(f"  {label}: {flops / 1e6:,.1f} MFLOP")
    for line in algebra.splitlines():
        console.print(f"    [cyan]{escape(line)}[/]")


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


def ranges(names: Iterable[str]) -> list[str]:
    """Dotted names with their first numbers gathered.

    Example:
        `["layers.0.q", "layers.1.q", "layers.3.q"]` gives `["layers.{0-1,3}.q"]`.
    """
    gathered: dict[tuple[str, str], list[int]] = {}
    for name in names:
        head, number, tail = [*re.split(r"(\d+)", name, maxsplit=1), "", ""][:3]
        numbers = gathered.setdefault((head, tail), [])
        if number:
            numbers.append(int(number))
    return [f"{head}{_runs(numbers)}{tail}" for (head, tail), numbers in gathered.items()]


def _runs(numbers: Iterable[int]) -> str:
    """Whole numbers as runs: `""` for none, `"2"`, `"{0-3,5}"`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return text if text.isdigit() or not text else f"{{{text}}}"
