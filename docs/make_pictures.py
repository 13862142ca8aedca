"""Draws the pictures of the documentation into docs/images/.

    python docs/make_pictures.py [--out FOLDER]

needs matplotlib, and takes seconds. What a picture says about a layer is what the package reports
of it: the steps, the FLOPs, the nodes of the graphs. What it says about bytes is read from
benchmarks/results/traffic.json. Nothing is timed.

Invariant: equal versions of torch, matplotlib and this package draw equal files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import runlora_fx

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
TRAFFIC = ROOT / "benchmarks" / "results" / "traffic.json"

GREY, BLUE, ORANGE, GREEN = "#9a9a9a", "#1f6fb4", "#d95f02", "#1b9e77"
PALE = {GREY: "#eeeeee", BLUE: "#dbe9f5", ORANGE: "#fbe3d1", GREEN: "#d6efe6"}
MONO = {"family": "DejaVu Sans Mono"}


@dataclass(frozen=True)
class Sizes:
    """A layer: tokens, inputs, outputs, rank."""

    tokens: int
    inputs: int
    outputs: int
    rank: int


#: The worked example of docs/pictures.md.
EXAMPLE = Sizes(tokens=4096, inputs=1024, outputs=1024, rank=64)


class LoraLayer(nn.Module):
    """``Y = X W' + 2 (X A') B'`` on the meta device: sizes without data."""

    def __init__(self, sizes: Sizes) -> None:
        """Make weights without data."""
        super().__init__()
        i, o, r = sizes.inputs, sizes.outputs, sizes.rank
        self.w = nn.Parameter(torch.empty(o, i, device="meta"), requires_grad=False)
        self.a = nn.Parameter(torch.empty(r, i, device="meta"))
        self.b = nn.Parameter(torch.empty(o, r, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """``x (tokens, in)`` to ``(tokens, out)``."""
        return x @ self.w.mT + 2 * ((x @ self.a.mT) @ self.b.mT)


def inputs_of(sizes: Sizes) -> Tensor:
    """An input that needs a gradient, as in the middle of a model."""
    return torch.empty(sizes.tokens, sizes.inputs, device="meta", requires_grad=True)


def site_of(sizes: Sizes) -> runlora_fx.Site:
    """What the package does to the layer, forward and backward, for the fewest FLOPs."""
    report = runlora_fx.explain(LoraLayer(sizes), inputs_of(sizes), objective="flops")
    (site,) = {site.shapes: site for site in report}.values()
    return site


def forward_graphs(sizes: Sizes) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The traced forward, before and after."""
    layer = LoraLayer(sizes)

    def forward(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
        return torch.func.functional_call(layer, {"w": w, "a": a, "b": b}, (x,))

    tensors = [tensor.detach() for tensor in (inputs_of(sizes), layer.w, layer.a, layer.b)]
    traced = make_fx(forward)(*tensors)
    return traced, runlora_fx.rewrite(traced, tensors, objective="flops")


def calls(gm: fx.GraphModule) -> list[str]:
    """The calls of a graph, one line each."""
    return [
        f"{node.name} = {getattr(node.target, '__name__', node.target).split('.')[0]}"
        f"({', '.join(map(str, node.args))})"
        for node in gm.graph.nodes
        if node.op == "call_function"
    ]


# --- drawing


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure to draw boxes on; a unit is an inch."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def box(axes: Axes, at: tuple[float, float, float, float], text: str, colour: str) -> None:
    """A rounded box (x, y, width, height) with a text in its middle."""
    x, y, width, height = at
    shape = "round,pad=0,rounding_size=0.08"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, shape, facecolor=PALE[colour], edgecolor=colour)
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow between two points."""
    style = {"arrowstyle": "-|>", "color": "#444444", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def matrix(axes: Axes, x: float, y: float, shape: tuple[int, int], name: str, colour: str) -> float:
    """A matrix to scale, its middle at height y; returns where it ends on the right."""
    height, width = (size / 2300 for size in shape)
    # Ranks are thin: a line is drawn at least this wide.
    height, width = max(height, 0.03), max(width, 0.03)
    axes.add_patch(Rectangle((x, y - height / 2), width, height, facecolor=colour, alpha=0.75))
    axes.text(x + width / 2, y - height / 2 - 0.13, name, ha="center", va="center", fontsize=10)
    return x + width + 0.12


def equation(axes: Axes, x: float, y: float, parts: list[Any]) -> None:
    """Matrices (shape, name, colour) and signs in a row."""
    for part in parts:
        if isinstance(part, str):
            axes.text(x, y, part, va="center", fontsize=12)
            x += 0.13 + 0.1 * len(part)
        else:
            x = matrix(axes, x, y, *part)


# --- the pictures


def layer() -> Figure:
    """The layer as it is written and as it runs, matrices to scale."""
    n, i, o, r = EXAMPLE.tokens, EXAMPLE.inputs, EXAMPLE.outputs, EXAMPLE.rank
    site = site_of(EXAMPLE)
    figure, axes = blank(9.8, 4.5)
    x, y = ((n, i), "X", BLUE), ((n, o), "Y", GREEN)
    weight, down, up = ((i, o), "W'", GREY), ((i, r), "A'", ORANGE), ((r, o), "B'", ORANGE)
    equation(axes, 0.25, 3.05, [y, "=", x, weight, "+", "2", x, down, up])
    equation(axes, 4.95, 3.05, [y, "=", x, ((i, o), "M'", ORANGE)])
    merged = [((o, i), "M", ORANGE), "=", ((o, i), "W", GREY), "+", "2", ((o, r), "B", ORANGE)]
    equation(axes, 7.1, 3.05, [*merged, ((r, i), "A", ORANGE)])
    for left, title, steps, flops in (
        (0.25, "as written", site.before, site.flops_before),
        (4.95, "as it runs", site.after, site.flops_after),
    ):
        axes.text(left, 4.25, title, fontsize=13, weight="bold")
        text = f"{steps}\n\n{flops / 1e9:.2f} GFLOP of matrix products (counted)"
        axes.text(left, 1.62, text, va="top", fontsize=9, linespacing=1.35, **MONO)
    axes.plot([4.65, 4.65], [0.1, 4.4], color=GREY, linewidth=0.8)
    return figure


def break_even() -> Figure:
    """The share of FLOPs that a layer saves in training, by its tokens."""
    figure, axes = plt.subplots(figsize=(7.4, 3.9), layout="constrained")
    tokens = [2**k for k in range(7, 16)]
    for width, rank, colour in (
        (512, 64, ORANGE),
        (1024, 64, GREEN),
        (4096, 64, BLUE),
        (4096, 16, GREY),
    ):
        sites = [site_of(Sizes(n, width, width, rank)) for n in tokens]
        saved = [100 * (1 - site.flops_after / site.flops_before) for site in sites]
        axes.plot(tokens, saved, "o-", color=colour, label=f"{width} wide, rank {rank}")
        axes.axvline(width, color=colour, linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(n) for n in tokens])
    axes.set_xlabel("tokens of a batch; dotted: as many tokens as the layer is wide")
    axes.set_ylabel("FLOPs saved, % (counted)")
    axes.set_title("forward and backward of one square layer", fontsize=10)
    axes.grid(linewidth=0.3)
    axes.legend(fontsize=9)
    return figure


def stages() -> Figure:
    """The four stages, with what each makes of the worked example."""
    before, after = forward_graphs(EXAMPLE)
    report = runlora_fx.last_report()
    assert report is not None
    (site,) = report.sites
    polynomial = f"Y = {site.considered[-1].form}"
    break_even = site.break_even.removeprefix("when ")
    figure, axes = blank(10.4, 2.9)
    panels = (
        ("graph", "\n".join(calls(before)), GREY),
        ("polynomial", f"{polynomial}\n\nX, W, A, B are leaves", BLUE),
        ("plan", f"{site.after}\n\nmerging pays when\n{break_even}", ORANGE),
        ("graph", "\n".join(calls(after)), GREEN),
    )
    left = 0.15
    widths = (2.75, 1.95, 1.95, 2.0)
    verbs = ("read", "search", "emit")
    for (title, text, colour), width in zip(panels, widths, strict=True):
        box(axes, (left, 0.75, width, 1.6), "", colour)
        axes.text(left, 2.47, title, fontsize=11, weight="bold")
        axes.text(left + 0.08, 2.22, text, va="top", fontsize=7, linespacing=1.5, wrap=True, **MONO)
        left += width + 0.5
    left = 0.15
    for width, verb in zip(widths[:-1], verbs, strict=True):
        left += width
        arrow(axes, (left + 0.04, 1.55), (left + 0.46, 1.55))
        axes.text(left + 0.25, 1.67, verb, ha="center", fontsize=9)
        left += 0.5
    back = {"arrowstyle": "-|>", "color": "#444444", "connectionstyle": "angle,angleA=0,angleB=90"}
    axes.plot([left + 1.0, left + 1.0], [0.72, 0.35], color="#444444", linewidth=1)
    axes.annotate("", (0.15 + 2.75 + 0.5 + 0.97, 0.73), (left + 1.0, 0.35), arrowprops=back)
    axes.text(
        7.2, 0.42, "verify: read again, the polynomial must be the same", ha="center", fontsize=9
    )
    return figure


def traffic() -> Figure:
    """Bytes that a layer moves and saves, counted, in the cases of benchmarks/traffic.py."""
    rows = json.loads(TRAFFIC.read_text(encoding="utf-8"))["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = plt.subplots(1, 2, figsize=(9.4, 5.4), sharey=True, layout="constrained")
    for panel, key, title in (
        (panels[0], "tax", "bytes moved beyond the frozen layer,\nshare of PEFT + Inductor"),
        (panels[1], "kept_over_frozen", "saved for the backward,\nfrozen layer = 1"),
    ):
        for offset, variant, colour in ((-0.2, "PEFT + Inductor", GREY), (0.2, "runlora", BLUE)):
            of = {row["case"]: row[key] for row in rows if row["variant"] == variant}
            places = [cases.index(case) + offset for case in of]
            bars = panel.barh(places, of.values(), 0.38, color=colour, label=variant)
            panel.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        panel.set_title(title, fontsize=10)
        panel.set_yticks(range(len(cases)), cases, fontsize=8)
        panel.margins(x=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle(
        "One layer, all projections adapted, planned for an H100. Counted, not timed.", fontsize=10
    )
    return figure


def rooms() -> Figure:
    """The rooms of the package and what flows between them."""
    figure, axes = blank(8.6, 2.9)
    box(axes, (0.1, 1.5, 0.9, 0.5), "graph", GREY)
    box(axes, (1.6, 1.35, 1.6, 0.8), "read\ngraph to\npolynomials", BLUE)
    box(axes, (3.8, 1.35, 1.6, 0.8), "search\nthe cheapest plan", BLUE)
    box(axes, (6.0, 1.35, 1.6, 0.8), "emit\nplan to nodes,\nproven", BLUE)
    box(axes, (7.9, 1.5, 0.6, 0.5), "graph", GREY)
    for start, end in ((1.0, 1.6), (3.2, 3.8), (5.4, 6.0), (7.6, 7.9)):
        arrow(axes, (start, 1.75), (end, 1.75))
    box(axes, (1.6, 0.2, 1.6, 0.6), "levels\nwhat operators mean", GREY)
    box(axes, (3.5, 0.2, 1.0, 0.6), "cost_model", GREY)
    box(axes, (4.65, 0.2, 1.2, 0.6), "tune\nmeasured times", GREY)
    box(axes, (6.0, 0.2, 1.6, 0.6), "runtime\noperators", GREY)
    for x, to in ((2.4, 2.4), (4.0, 4.3), (5.25, 4.9), (6.8, 6.8)):
        arrow(axes, (x, 0.8), (to, 1.35))
    box(axes, (3.8, 2.4, 1.6, 0.4), "algebra: shared data", ORANGE)
    box(axes, (6.0, 2.4, 1.6, 0.4), "report", GREEN)
    arrow(axes, (4.6, 2.4), (4.6, 2.15))
    arrow(axes, (6.8, 2.15), (6.8, 2.4))
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "layer": layer,
    "break-even": break_even,
    "stages": stages,
    "traffic": traffic,
    "rooms": rooms,
}


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=IMAGES, help="the folder to write to")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PICTURES)}; all if none")
    given = parser.parse_args()
    matplotlib.use("Agg")
    # Letters are drawn as paths, so that a picture looks the same everywhere.
    plt.rcParams.update({"svg.hashsalt": "runlora", "svg.fonttype": "path"})
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names or PICTURES:
        path = given.out / f"{name}.svg"
        PICTURES[name]().savefig(path, metadata={"Date": None, "Creator": None})
        # matplotlib ends some lines with spaces.
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
