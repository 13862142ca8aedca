"""The plot of a set: each contender's time over that of PEFT + Inductor, with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(results: Mapping[str, Any], to: Path) -> None:
    """Draw a panel for each case into an SVG file, a line for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [case for case in results["cases"] if "refused" not in case]
    if not cases:
        return
    names = list(dict.fromkeys(name for case in cases for name in case["contenders"]))
    heights = [0.6 + 0.24 * len(case["contenders"]) for case in cases]
    figure, panels = plt.subplots(
        len(cases),
        1,
        sharex=True,
        squeeze=False,
        figsize=(8, sum(heights) + 0.6),
        height_ratios=heights,
    )
    for case, panel in zip(cases, panels[:, 0], strict=True):
        rows = list(case["contenders"].items())
        for at, (name, row) in enumerate(rows):
            ratio = row["ratio"]
            colour = f"C{names.index(name) % 10}"
            panel.plot(
                [ratio["low"], ratio["high"]], [at, at], color=colour, linewidth=5, alpha=0.4
            )
            panel.plot(ratio["median"], at, "o", color=colour, markersize=5)
        panel.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.grid(axis="x", linewidth=0.3)
        panel.set_title(case["case"], fontsize=9, loc="left")
    panels[-1, 0].set_xlabel("time over that of PEFT + Inductor, measured; bars: 95%", fontsize=8)
    figure.tight_layout()
    # Equal data make an equal file.
    plt.rcParams["svg.hashsalt"] = "field"
    figure.savefig(to, metadata={"Date": None})
    plt.close(figure)
