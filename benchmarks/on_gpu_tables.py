"""The tables of `benchmarks/on_gpu.py` as Markdown: everything in them is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from measuring.tables import heading, section


def markdown(results: Mapping[str, Any]) -> str:
    """All that was measured, and what was not."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    machine = results["machine"]
    yield f"{heading(machine)} Widths and tokens / {machine['scale']}."
    for case in results["cases"]:
        yield from section(case)
    if results.get("kernels"):
        yield from ("", "## Kernels", "", "| kernel | layer | ms | plain, ms | ratio | min, max |")
        yield "|---|---|---|---|---|---|"
        for row in results["kernels"]:
            yield f"| {row['kernel']} | {row['shape']} | {_times(row)} |"
    if results.get("not_run"):
        yield from ("", f"Not run, the time was up: {', '.join(results['not_run'])}.")


def _times(row: Mapping[str, Any]) -> str:
    """The cells of a kernel's times."""
    if "refused" in row:
        return f"**refused**: {row['refused']} | | |"
    ratio = row["ratio"]
    return (
        f"{row['kernel_s'] * 1e3:.3f} | {row['plain_s'] * 1e3:.3f} | {ratio['median']:.3f} "
        f"| {ratio['least']:.3f}, {ratio['most']:.3f}"
    )
