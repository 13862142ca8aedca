"""The report as a page, in a browser: what it shows, how it is sorted and filtered, how it looks.

The tests of looks and of behaviour need playwright and a browser. The others read the page as text.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import runlora_fx
from runlora_fx.report.data import Report, Site
from runlora_fx.report.figures import Curve
from runlora_fx.report.gathered import gathered
from runlora_fx.report.html.axes import LogAxis, crossings
from runlora_fx.report.html.kinds import common_prefix, kinds_of
from runlora_fx.report.html.layered import Node, layered
from runlora_fx.report.html.numbers import change
from runlora_fx.report.html.plots import break_even_plot, products
from runlora_fx.report.sites import Refusal
from runlora_fx.report.units import quantity

IN, OUT, RANK, TOKENS = 64, 96, 4, 512

#: The browsers that are looked for, and the pages' width on a phone [px].
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NARROW = 390

#: A name that would run a script if it were not escaped.
HOSTILE = "layers.0.<img src=x onerror=\"document.title='run'\">.'&amp;"


class Adapted(nn.Module):
    """A linear layer with an adapter."""

    def __init__(self, width: int = OUT, p: float = 0.0) -> None:
        super().__init__()
        self.base_layer = nn.Linear(IN, width, bias=False).requires_grad_(False)
        self.lora_A = nn.Linear(IN, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, width, bias=False)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        dropped = nn.functional.dropout(x, self.p)
        made: Tensor = self.lora_B(self.lora_A(dropped))
        return self.base_layer(x) + made


class Model(nn.Module):
    """Two equal layers, a wider one, and one that dropout keeps from being merged."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"query": Adapted()}) for _ in range(2))
        self.wide = Adapted(4 * OUT)
        self.dropped = Adapted(2 * OUT, p=0.5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (layer["query"] for layer in self.layers)
        made = (first(x.sin()), second(x.cos()), self.wide(x.exp()), self.dropped(x.tanh()))
        return torch.cat([one.flatten() for one in made]).square().sum()


@cache
def report(objective: str = "time") -> Report:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, IN, requires_grad=True)
    device = "h100" if objective == "time" else ""
    return runlora_fx.explain(Model(), x, objective=objective, device=device, strict=True)


def many(count: int) -> Report:
    """A report of many kinds, made of the sites of one."""
    sites = report().sites
    named = [
        replace(
            sites[i % len(sites)],
            modules=(f"model.layers.{i}.q_proj",),
            reason=f"reason {i}",
            flops_before=(7 * i) % count + 1,
        )
        for i in range(count)
    ]
    return replace(report(), sites=tuple(named))


def hostile() -> Report:
    sites = tuple(replace(site, modules=(HOSTILE,)) for site in report().sites)
    return replace(report(), sites=sites, refusals=(Refusal(HOSTILE, (HOSTILE,)),))


PAGES: dict[str, Callable[[], Report]] = {
    "time": report,
    "flops": lambda: report("flops"),
    "many": lambda: many(32),
    "hostile": hostile,
    "without figures": lambda: replace(
        report(), sites=tuple(replace(site, find_figures=lambda: None) for site in report().sites)
    ),
    "no site": lambda: Report("inference", refusals=(Refusal("a reason", ("a.b",)),)),
    "cached": lambda: Report("cached", from_cache=True),
}


@cache
def page_of(name: str) -> str:
    return PAGES[name]().to_html()


# --- the text of the page


def test_a_page_has_the_verdict_and_how_it_was_planned() -> None:
    text = page_of("time")
    assert f"<h1>{report().verdict}</h1>" in text
    assert "Plans were ranked by predicted time." in text
    assert report().planned_for in text and "594 TFLOP/s" not in text  # the layers are in fp32
    assert "40.1 TFLOP/s" in text and "2.68 TB/s" in text
    assert "Nothing was measured on it." in text
    assert "set lora_dropout=0" in text


def test_without_rates_the_page_says_why_there_is_no_roofline() -> None:
    text = page_of("flops")
    assert "ranked by the FLOPs" in text
    assert "No roofline: plans were ranked by FLOPs" in text
    assert text.count('aria-label="Plot by the number of tokens"') == len(kinds("flops"))


def test_a_site_without_figures_is_shown_as_text() -> None:
    text = page_of("without figures")
    assert "<svg" not in text.partition("<main>")[2]
    assert text.count("No drawing: ") == sum(1 + kind.site.changed for kind in kinds("time"))
    assert text.count("No roofline: the report has no data for it") == len(kinds("time"))


def kinds(objective: str) -> list[Any]:
    return kinds_of(report(objective).sites, report(objective).rates)


def test_equal_layers_are_one_row() -> None:
    found = {tuple(kind.names): len(kind.modules) for kind in kinds("time")}
    assert found == {("layers.{0-1}.query",): 2, ("wide",): 1, ("dropped",): 1}
    assert page_of("time").count("<tr data-search=") == len(found)


@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_one_file(name: str) -> None:
    text = page_of(name)
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert not re.search(r"""(src|href)=["'](?!#|data:,)|@import|url\((?!#)|https?:""", text)


def test_names_from_the_model_are_escaped() -> None:
    assert "<img" not in page_of("hostile")
    assert "&lt;img" in page_of("hostile")


def test_pages_of_equal_reports_are_equal() -> None:
    assert report().to_html() == page_of("time")


# --- drawings


def figures_of(name: str, objective: str = "time") -> Any:
    (site,) = (site for site in report(objective) if site.modules == (name,))
    return site.figures


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


# --- layout, names and numbers


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


def test_names_of_equal_layers_are_gathered() -> None:
    names = [f"layers.{i}.q" for i in (0, 1, 2, 5)] + ["head"]
    assert gathered(names) == ["layers.{0-2,5}.q", "head"]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["model.layers.0.q", "model.layers.1.q"], "model."),
        (["model.a.q", "model.a.k"], "model.a."),
        (["a.q", "b.q"], ""),
        (["q"], ""),
        ([], ""),
    ],
)
def test_what_all_names_begin_with_is_said_once(names: list[str], wanted: str) -> None:
    sites: list[Site] = [replace(report().sites[0], modules=(name,)) for name in names]
    assert common_prefix(kinds_of(sites, ())) == wanted


def test_numbers_have_units() -> None:
    assert quantity(0, "FLOP") == "0 FLOP"
    assert quantity(1536, "B") == "1.536 kB"
    assert quantity(2.5e-5, "s") == "25 µs"
    assert (change(200, 150), change(3, 3), change(0, 1)) == ("-25.0%", "0%", "none")


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser: one that is installed, or playwright's own."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with api.sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("there is no browser; run `playwright install chromium`")
        yield playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Shows a page. Afterwards, nothing was logged and nothing was asked for."""
    logged, asked, contexts = [], [], []

    def shown(name: str, width: int = 1280, scheme: str = "light") -> Any:
        file = tmp_path / "report.html"
        file.write_text(page_of(name), encoding="utf-8")
        viewport = {"width": width, "height": 900}
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: logged.append(message.text))
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        return page

    yield shown
    for context in contexts:
        context.close()
    assert logged == []
    assert all(url.startswith("file:") and url.endswith("/report.html") for url in asked)


Show = Callable[..., Any]


@pytest.mark.parametrize("width", (NARROW, 1280))
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_as_wide_as_its_window(show: Show, name: str, width: int) -> None:
    page = show(name, width)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", ("time", "many", "flops"))
def test_a_printed_page_is_as_wide_as_its_paper(show: Show, name: str) -> None:
    page = show(name, width=720)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 720


def rows(page: Any) -> Any:
    return page.locator("#kinds tbody tr:not([hidden])")


def test_a_click_on_a_header_sorts_and_another_reverses(show: Show) -> None:
    page = show("many")
    head = page.locator("#kinds th", has_text="FLOPs before")
    values = "rows => rows.map(row => Number(row.cells[4].dataset.value))"
    came = rows(page).evaluate_all(values)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert rows(page).evaluate_all(values) == sorted(came) != came
    head.locator("button").press("Enter")  # by the keyboard
    assert head.get_attribute("aria-sort") == "descending"
    assert rows(page).evaluate_all(values) == sorted(came, reverse=True)


def test_numbers_in_names_are_sorted_as_numbers(show: Show) -> None:
    page = show("many")
    page.locator("#kinds th button", has_text="Modules").click()
    names = rows(page).evaluate_all("rows => rows.map(row => row.cells[0].textContent)")
    assert names == [f"layers.{i}.q_proj" for i in range(32)]
    sorted_by = page.locator("#kinds th[aria-sort]")
    assert sorted_by.count() == 1


@pytest.mark.parametrize("text", ("", "layers.17", "REASON 3", "q_proj reason 3", "?"))
def test_the_filter_looks_for_all_words(show: Show, text: str) -> None:
    page = show("many")
    page.fill("#filter", text)
    words = text.lower().split()
    found = [kind.search for kind in kinds_of(many(32).sites, ())]
    count = sum(all(word in line for word in words) for line in found)
    assert (count == 32) == (text == "") and (count == 0) == (text == "?")
    assert rows(page).count() == page.locator("details.kind:visible").count() == count
    assert page.locator("#shown").text_content() == f"{count} of 32 shown"


def test_the_filter_tells_changed_layers_from_others(show: Show) -> None:
    page = show("time")
    wanted = [kind.status for kind in kinds("time")]
    assert {"changed", "left alone"} == set(wanted)
    for status in ("changed", "left alone"):
        page.check(f"input[value='{status}']")
        assert rows(page).count() == wanted.count(status)
    page.check("input[value=all]")
    assert rows(page).count() == len(wanted)


def test_a_link_of_the_table_opens_the_section(show: Show) -> None:
    page = show("many")
    assert not page.locator("#kind-9").evaluate("one => one.open")
    page.locator("a[href='#kind-9']").click()
    assert page.locator("#kind-9").evaluate("one => one.open")


def test_every_section_is_open_in_print(show: Show) -> None:
    page = show("many")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details.kind[open]").count() == 2


def test_a_hostile_name_is_text(show: Show) -> None:
    page = show("hostile")
    assert page.title() == "runlora report"
    assert page.locator("img").count() == 0
    assert HOSTILE in page.locator("#kinds tbody td").first.inner_text().replace("\n", "")


CONTRAST = """
() => {
    const channel = (x) => (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    const light = (css) => {
        const [r, g, b] = css.match(/[\\d.]+/g).map(Number).map(channel);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (one) => {
        for (; one; one = one.parentElement) {
            const css = getComputedStyle(one).backgroundColor;
            if (css !== "rgba(0, 0, 0, 0)") return css;
        }
        return "rgb(255, 255, 255)";
    };
    const found = [];
    for (const one of document.querySelectorAll("h1, h2, h3, p, dt, dd, th, td, td a, li, summary,"
        + " label, output, code, pre, .tag, .status, figcaption, footer, svg text")) {
        if (!one.textContent.trim()) continue;
        const style = getComputedStyle(one);
        const isSvg = one instanceof SVGElement;
        const near = ":scope > rect:not(.mark):not(.frame)";
        const box = isSvg && one.parentElement.querySelector(near);
        const under = box ? getComputedStyle(box).fill : ground(one);
        const pair = [light(isSvg ? style.fill : style.color), light(under)].sort((a, b) => b - a);
        const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
        found.push([contrast, one.tagName + " " + one.textContent.slice(0, 40)]);
    }
    return [found, light(getComputedStyle(document.body).backgroundColor)];
}
"""


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_text_stands_out_in_both_colour_schemes(show: Show, scheme: str) -> None:
    page = show("time", scheme=scheme)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    found, ground = page.evaluate(CONTRAST)
    assert len(found) > 100
    assert [one for one in found if one[0] < 4.5] == []
    assert ground > 0.9 if scheme == "light" else ground < 0.05


def test_texts_of_drawings_lie_within_their_boxes(show: Show) -> None:
    page = show("time")
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    found = page.evaluate(
        """() => [...document.querySelectorAll(".sketch g")].flatMap((group) => {
            const box = group.querySelector("rect").getBBox();
            return [...group.querySelectorAll("text")].map((text) => {
                const own = text.getBBox();
                return own.x >= box.x && own.x + own.width <= box.x + box.width
                    && own.y >= box.y && own.y + own.height <= box.y + box.height;
            });
        })"""
    )
    assert len(found) > 50
    assert all(found)
