"""The drawings and plots of a report's page: what they show, and where it lies."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from report_pages import IN, OUT, RANK, TOKENS, Adapted, figures_of, page_of, report
from torch import Tensor, nn

import runlora_fx
from runlora_fx.report.figures.figures import Curve
from runlora_fx.report.html.axes import LogAxis, crossings
from runlora_fx.report.html.layered import Node, layered
from runlora_fx.report.html.plots import break_even_plot, products

# --- drawings


def test_a_drawing_has_the_steps_of_the_plan_and_their_sizes() -> None:
    figures = figures_of("wide")
    wide = 4 * OUT
    before = {box.text: box.sizes for box in figures.before.boxes if box.kind == "product"}
    assert before == {
        "X W'": f"{TOKENS}x{IN} · {IN}x{wide}",
        "Z = X A'": f"{TOKENS}x{IN} · {IN}x{RANK}",
        "Z B'": f"{TOKENS}x{RANK} · {RANK}x{wide}",
        "dB = dY' Z": f"{wide}x{TOKENS} · {TOKENS}x{RANK}",
        "Z2 = dY B": f"{TOKENS}x{wide} · {wide}x{RANK}",
        "dA = Z2' X": f"{RANK}x{TOKENS} · {TOKENS}x{IN}",
        "dY W": f"{TOKENS}x{wide} · {wide}x{IN}",
        "Z2 A": f"{TOKENS}x{RANK} · {RANK}x{IN}",
    }
    given = {box.name for box in figures.before.boxes if box.kind == "input"}
    assert given == {"X", "W", "A", "B", "dY"}
    sums = {box.text for box in figures.before.boxes if box.kind == "sum"}
    assert sums == {"Y = X W' + Z B'", "dX = dY W + Z2 A"}
    results = {box.name for box in figures.before.boxes if box.is_result}
    assert results == {"Y", "dX", "dA", "dB"}


def test_a_drawing_has_the_flops_of_the_plan() -> None:
    for site in report():
        drawings = [
            (site.figures.before, site.flops_before),
            (site.figures.after, site.flops_after),
        ]
        for drawing, flops in drawings[: 1 + site.changed]:
            assert sum(box.flops for box in drawing.boxes) == flops


def test_edges_join_what_a_step_reads() -> None:
    boxes, edges = figures_of("wide").before.boxes, figures_of("wide").before.edges
    pairs = {(boxes[e.source].text, boxes[e.target].text, e.is_saved) for e in edges}
    assert {("X", "Z = X A'", False), ("A", "Z = X A'", False), ("B", "Z B'", False)} <= pairs
    assert ("Z = X A'", "dB = dY' Z", True) in pairs
    assert {saved for _, _, saved in pairs if saved} == {True}
    phases = {(boxes[e.source].is_backward, boxes[e.target].is_backward) for e in edges}
    assert (True, False) not in phases


class Scaled(Adapted):
    """DoRA: ``(X W' + X A' B') diag(g)``, written with the layer's own output twice."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(OUT))

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer(x)
        made: Tensor = self.lora_B(self.lora_A(x))
        return base + (self.gain - 1) * base + self.gain * made


def test_what_is_given_in_a_drawing_is_a_leaf() -> None:
    """A value without a step of its own is drawn as one, of the leaves that it is made of."""
    torch.manual_seed(0)
    x = torch.randn(TOKENS, IN, requires_grad=True)
    sites = runlora_fx.explain(Scaled(), x, objective="flops", strict=True).sites
    drawings = [d for s in sites if s.figures for d in (s.figures.before, s.figures.after) if d]
    given = {box.text for drawing in drawings for box in drawing.boxes if box.kind == "input"}
    assert {"X", "W", "A", "B", "g"} <= given
    assert not [name for name in given if " " in name]
    for drawing in drawings:
        made = {edge.target for edge in drawing.edges}
        is_given = [box.kind == "input" for box in drawing.boxes]
        assert made == {i for i, one in enumerate(is_given) if not one}


def test_drawings_are_on_the_page() -> None:
    text = page_of("time")
    for figures in (site.figures for site in report()):
        for drawing in filter(None, (figures.before, figures.after)):
            for box in drawing.boxes:
                assert f">{box.sizes}</text>" in text


# --- plots


def amount_at(curve: Curve, tokens: float) -> float:
    letters = {"i": IN, "o": 4 * OUT, "r": RANK, "N": tokens}
    return float(curve.amount.subs({s: letters[s.name] for s in curve.amount.free_symbols}))


def test_plans_are_equal_where_their_curves_cross() -> None:
    """The plan that merges has fewer FLOPs from there on."""
    figures = figures_of("wide", "flops")
    plot = break_even_plot(figures)
    assert plot is not None
    assert (plot.tokens, plot.names, plot.is_timed) == (TOKENS, ("before", "after"), False)
    (crossing,) = plot.crossings
    before, after = figures.curves
    assert amount_at(before, crossing - 1) < amount_at(after, crossing - 1)
    assert amount_at(before, crossing + 1) > amount_at(after, crossing + 1)


def test_a_curve_of_times_adds_the_times_of_the_steps() -> None:
    figures = figures_of("wide")
    steps = sum(box.seconds for box in figures.before.boxes if box.seconds)
    assert figures.is_timed
    assert amount_at(figures.curves[0], TOKENS) == pytest.approx(steps)


def test_a_curve_of_flops_is_the_sites_expression() -> None:
    (site,) = (site for site in report("flops") if site.modules == ("wide",))
    assert site.figures is not None
    assert site.figures.curves[0].amount == site.flops_before_expr
    assert site.figures.curves[1].amount == site.flops_after_expr


def test_products_lie_below_the_roof() -> None:
    (rates,) = (rates for rates in report().rates if rates.dtype == "float32")
    rows = products(figures_of("wide"))
    assert [row.key for row in rows][:9] == [*"12345678", "a"]
    for row in rows:
        assert row.intensity == row.box.flops / row.box.bytes
        assert row.rate is not None
        assert row.rate < min(rates.flops, row.intensity * rates.bandwidth)


@pytest.mark.parametrize(
    ("find", "wanted"),
    [(lambda n: n - 100.0, [100]), (lambda n: (n - 10) * (n - 1000), [10, 1000]), (abs, [])],
)
def test_crossings_are_where_the_sign_changes(
    find: Callable[[float], float], wanted: list[float]
) -> None:
    samples = LogAxis.around(1, 20_000, 0, 100).samples(50)
    assert crossings(find, samples) == pytest.approx(wanted)


def test_a_logarithmic_axis_has_a_tick_at_every_power_of_ten() -> None:
    axis = LogAxis.around(3, 20_000, 0, 100)
    ticks = [(tick.at, tick.text) for tick in axis.ticks]
    assert ticks == [(0, "1"), (20, "10"), (40, "100"), (60, "1k"), (80, "10k"), (100, "100k")]


# --- layout


def test_boxes_of_a_layout_do_not_overlap_and_edges_go_right() -> None:
    nodes = [Node(20, band=i % 2, is_source=i < 4) for i in range(12)]
    edges = [(0, 4), (1, 4), (2, 5), (3, 5), (4, 6), (5, 7), (6, 8), (0, 8), (7, 9), (4, 9)]
    edges += [(8, 10), (3, 11), (9, 11)]
    layout = layered(nodes, edges, gap=7.0)
    assert all(layout.columns[source] < layout.columns[target] for source, target in edges)
    for (source, target), route in layout.routes.items():
        assert len(route) == layout.columns[target] - layout.columns[source] - 1
    places = sorted(zip(layout.columns, layout.middles, strict=True))
    for (column, one), (another, other) in pairwise(places):
        assert column != another or other - one >= 20 - 1e-9
    lower = [y for node, y in zip(nodes, layout.middles, strict=True) if node.band]
    upper = [y for node, y in zip(nodes, layout.middles, strict=True) if not node.band]
    assert max(upper) + 10 <= layout.bands[1] <= min(lower) - 10 - 7 + 1e-9
    assert layout.height >= max(lower) + 10 - 1e-9


def test_a_layout_of_a_chain_has_no_crossing() -> None:
    nodes = [Node(10) for _ in range(4)]
    layout = layered(nodes, [(0, 3), (1, 2)])
    assert (layout.middles[0] < layout.middles[1]) == (layout.middles[3] < layout.middles[2])
    assert layered([], []).height == 0
