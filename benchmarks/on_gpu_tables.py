"""The tables of `benchmarks/on_gpu.py` as Markdown: everything in them is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MiB = 1 << 20


def markdown(results: Mapping[str, Any]) -> str:
    """All that was measured, and what was not."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    machine = results["machine"]
    yield (
        f"Measured on {machine['device']}, torch {machine['torch']}, CUDA {machine['cuda']}, "
        f"PEFT {machine['peft']}; widths and tokens / {machine['scale']}. Ratio: the median over "
        "the rounds of the time over that of PEFT + Inductor. Peak: what a step holds beyond what "
        f"was held before it, by {machine['peak']}. Error: the largest relative error of the "
        "output and the gradients. First step: with compiling."
    )
    for case in results["cases"]:
        yield from ("", f"## {case['case']}", "")
        if "refused" in case:
            yield f"**Refused**, no times: {case['refused']}"
        else:
            yield from _case(case)
    if results.get("kernels"):
        yield from ("", "## Kernels", "", "| kernel | layer | ms | plain, ms | ratio | min, max |")
        yield "|---|---|---|---|---|---|"
        for row in results["kernels"]:
            yield f"| {row['kernel']} | {row['shape']} | {_times(row)} |"
    if results.get("not_run"):
        yield from ("", f"Not run, the time was up: {', '.join(results['not_run'])}.")


def _case(case: Mapping[str, Any]) -> Iterator[str]:
    """The table of one case."""
    yield f"| {case['rounds']} rounds | ms | ratio | min, max | peak, MiB | error | first step, s |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in case["contenders"].items():
        ratio = row["ratio"]
        error = f"{row['error']:.1e}" if "error" in row else ""
        yield (
            f"| {name} | {row['median_s'] * 1e3:.2f} | {ratio['median']:.3f} "
            f"| {ratio['min']:.3f}, {ratio['max']:.3f} | {row['peak_B'] / MiB:.1f} | {error} "
            f"| {row['first_step_s']:.1f} |"
        )


def _times(row: Mapping[str, Any]) -> str:
    """The cells of a kernel's times."""
    if "refused" in row:
        return f"**refused**: {row['refused']} | | |"
    ratio = row["ratio"]
    return (
        f"{row['kernel_s'] * 1e3:.3f} | {row['plain_s'] * 1e3:.3f} | {ratio['median']:.3f} "
        f"| {ratio['min']:.3f}, {ratio['max']:.3f}"
    )
