"""Tables: what was measured, as Markdown.

Invariant: every number is measured, or said to be counted. A case that was refused has no times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MiB = 1 << 20

#: What the columns mean.
LEGEND = (
    "Ratio: the median over the rounds of the time over that of PEFT + Inductor in the same round, "
    "with the interval that contains the true median in 95% of all cases. Tax removed: the share "
    "of what the adapters take beyond the frozen model under Inductor that a contender does not "
    "take. Kept: what the forward keeps for the backward, weights and inputs apart. Peak: what a "
    "step holds beyond what was held before it, by {peak}. Error: the largest relative error of "
    "the output and the gradients. First step: with compiling, each with empty caches of torch."
)


def heading(machine: Mapping[str, Any]) -> str:
    """What was measured where."""
    known = {
        "torch": machine["torch"],
        "PEFT": machine["peft"],
        "transformers": machine["transformers"],
        "CUDA": machine["cuda"],
        "commit": machine["commit"],
    }
    versions = ", ".join(f"{name} {value}" for name, value in known.items() if value)
    return (
        f"Measured on {machine['device']} ({machine['capability']}, {machine['threads']} threads), "
        f"{versions}. {LEGEND.format(peak=machine['peak'])}"
    )


def section(case: Mapping[str, Any]) -> Iterator[str]:
    """The lines of one case, under its heading."""
    yield from ("", f"## {case['case']}", "")
    if "about" in case:
        yield from (f"{case['about']}.", "")
    if "refused" in case:
        yield f"**Refused**, no times: {case['refused']}"
        return
    yield (
        f"| {case['rounds']} rounds | ms | ratio | 95% | min, max | tax removed | kept, MiB "
        "| peak, MiB | error | first step, s |"
    )
    yield f"|{'---|' * 10}"
    for name, row in case["contenders"].items():
        ratio = row["ratio"]
        removed = row.get("tax_removed")
        cells = [
            name,
            f"{row['median_s'] * 1e3:.2f}",
            f"{ratio['median']:.3f}",
            f"{ratio['low']:.3f} to {ratio['high']:.3f}",
            f"{ratio['least']:.3f}, {ratio['most']:.3f}",
            "" if removed is None else f"{removed:.0%}",
            f"{row['kept_B'] / MiB:.1f}",
            f"{row['peak_B'] / MiB:.1f}",
            f"{row['error']:.1e}" if "error" in row else "",
            f"{row['first_step_s']:.1f}",
        ]
        yield f"| {' | '.join(cells)} |"
    planned = {name: row for name, row in case["contenders"].items() if "sites" in row}
    if planned:
        counts = (f"{row['changed_sites']} of {row['sites']} ({n})" for n, row in planned.items())
        yield from ("", f"Sites that plans change: {'; '.join(counts)}.")
    if "removable" in case:
        removable = case["removable"]
        yield ""
        yield (
            f"Counted: the plan with fewest FLOPs removes {removable['flops']:.0%} of the FLOPs "
            f"that the adapters add. The chosen plan removes {removable['bytes']:.0%} of the bytes "
            "that they move."
        )
    if case["recompiled"]:
        yield from ("", f"**{case['recompiled']} graphs were compiled while steps were timed.**")
