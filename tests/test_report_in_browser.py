"""A report's page in a browser: how it is sorted and filtered, and how it looks.

These tests need playwright and a browser.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report_pages import HOSTILE, PAGES, kinds, many, page_of

from runlora_fx.report.html.kinds import kinds_of

#: The browsers that are looked for, and the pages' width on a phone [px].
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NARROW = 390


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


@pytest.mark.parametrize("name", ("Time", "Saved"))
def test_the_table_is_sorted_by_predicted_time_and_by_saved_bytes(show: Show, name: str) -> None:
    page = show("time")
    page.locator("#kinds th button", has_text=name).click()
    column = page.locator("#kinds th[aria-sort]").evaluate("head => head.cellIndex")
    values = f"rows => rows.map(row => Number(row.cells[{column}].dataset.value))"
    found = rows(page).evaluate_all(values)
    given = {
        "Time": [kind.time_share for kind in kinds("time")],
        "Saved": [kind.site.saved[1] - kind.site.saved[0] for kind in kinds("time")],
    }
    assert found == sorted(given[name])


@pytest.mark.parametrize("name", ("time", "flops"))
def test_the_table_fits_in_a_wide_window(show: Show, name: str) -> None:
    box = (
        show(name)
        .locator("#kinds")
        .evaluate("one => [one.scrollWidth, one.parentElement.clientWidth]")
    )
    assert box[0] <= box[1]


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
