"""The text of a report's page: the verdict, how it was planned, and the table of kinds."""

import re
from dataclasses import replace

import pytest
from report_pages import PAGES, kinds, page_of, report

from runlora_fx.report.data import Site
from runlora_fx.report.gathered import gathered
from runlora_fx.report.html.kinds import common_prefix, kinds_of
from runlora_fx.report.html.numbers import change
from runlora_fx.report.kinds import rows_of
from runlora_fx.report.units import quantity


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


def test_kinds_are_the_rows_of_the_text() -> None:
    rows = rows_of(report().sites)
    assert [kind.row for kind in kinds("time")] == rows
    assert [kind.key for kind in kinds("time")] == list(range(1, len(rows) + 1))


def test_a_row_has_the_predicted_time_and_the_saved_bytes() -> None:
    for kind in kinds("time"):
        site = kind.site
        assert site.seconds is not None
        assert kind.time_change == change(*site.seconds)
        assert kind.saved_change == change(*site.saved)
        assert (kind.time_share < 1) == site.changed
        assert f">{kind.time_change}</td>" in page_of("time")
    assert "Time is the predicted change" in page_of("time")
    for kind in kinds("flops"):
        assert kind.time_change == ""
        assert f">{kind.saved_change}</td>" in page_of("flops")
    assert ">Time</button>" not in page_of("flops") and ">Saved</button>" in page_of("flops")
    (more,) = kinds_of([replace(report().sites[0], saved=(0, 1500))], ())
    assert more.saved_change == "+1.5 kB"


def test_the_time_of_planning_has_two_digits() -> None:
    assert '<dd class="big">876 ms</dd>' in replace(report(), planning_seconds=0.876).to_html()


def test_products_in_float32_are_counted() -> None:
    words = "Products of 16-bit matrices in float32"
    assert words in replace(report(), upcast=7).to_html()
    assert words not in report().to_html()


def test_a_report_of_other_sizes_says_so() -> None:
    words = "It was compiled for other sizes, and the numbers hold for those."
    assert words in replace(report(), from_cache=True, of_other_sizes=True).to_html()
    assert words not in replace(report(), from_cache=True).to_html()


# --- names and numbers


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
