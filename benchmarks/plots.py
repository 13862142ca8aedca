"""The plot of `benchmarks/traffic.py`: predicted times by case and device. No time is measured.

Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FROZEN = "frozen"

#: By variant: the colour and the marker.
STYLES = {
    "PEFT + Inductor": ("#888888", "s"),
    "runlora": ("#1f6fb4", "o"),
    'runlora, memory="low"': ("#d95f02", "D"),
    'runlora, memory="fast"': ("#1b9e77", "^"),
}


def draw(content: Mapping[str, Any], to: Path) -> None:
    """Draw a panel for each device: a row for each case, a mark for each variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows: Sequence[Mapping[str, Any]] = content["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    devices = list(rows[0]["roofline_ms"])
    frozen = {row["case"]: row["roofline_ms"] for row in rows if row["variant"] == FROZEN}
    figure, panels = plt.subplots(
        1, len(devices), sharey=True, figsize=(2.2 * len(devices) + 2, 0.34 * len(cases) + 1.8)
    )
    offsets = {name: 0.24 * (i - 1.5) for i, name in enumerate(STYLES)}
    for device, panel in zip(devices, panels, strict=True):
        for name, (colour, marker) in STYLES.items():
            found = [row for row in rows if row["variant"] == name]
            panel.plot(
                [row["roofline_ms"][device] / frozen[row["case"]][device] for row in found],
                [cases.index(row["case"]) + offsets[name] for row in found],
                marker,
                color=colour,
                label=name,
                markersize=4,
            )
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(device, fontsize=9)
        panel.grid(axis="x", linewidth=0.3)
        panel.tick_params(labelsize=8)
        for i in range(1, len(cases)):
            panel.axhline(i - 0.5, color="#dddddd", linewidth=0.5)
    panels[0].set_yticks(range(len(cases)), cases, fontsize=8)
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(STYLES), fontsize=8)
    figure.supxlabel(
        "time over that of the frozen layer, predicted from counts by each device's published "
        f"peaks; planned for {content['device']}; nothing is measured",
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    # Equal data make an equal file.
    plt.rcParams["svg.hashsalt"] = "traffic"
    figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)
    plt.close(figure)
