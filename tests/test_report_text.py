"""How a report reads: a table with names to search for, formulas once, plain text and rich text."""

import io
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import rich
import torch
from rich.console import Console
from test_causes import Layer, data
from test_report import Adapted
from torch import Tensor, nn

import runlora_fx
from runlora_fx.report.data import Report, combined
from runlora_fx.report.gathered import gathered
from runlora_fx.report.kinds import rows_of
from runlora_fx.report.text.formulas import changes
from runlora_fx.report.units import count, duration, quantity


class Block(nn.Module):
    """Three adapted layers; one has an adapter that sees dropped-out inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Layer(), Layer()
        self.dropped = Adapted(0.5, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.gate_proj(x).sin() * self.up_proj(x.cos()) + self.dropped(x.tan()).cos()
        return made


class Model(nn.Module):
    """Blocks in a row, perhaps with a graph break after the first."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)[:, :32].sin()
        if self.breaks:
            torch._dynamo.graph_break()
        x = self.layers[1](x)[:, :32].sin()
        made: Tensor = self.layers[2](x)
        return made


@pytest.fixture(scope="module")
def report() -> Report:
    return runlora_fx.explain(Model(), data(256), objective="time", device="h100", strict=True)


def wide(report: Report) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(report)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- names


@pytest.mark.parametrize(
    ("names", "expected"),
    (
        (["layers.0.q", "layers.1.q", "layers.3.q"], ["layers.{0-1,3}.q"]),
        (["layers.2.q"], ["layers.2.q"]),
        (["a.0", "b.0", "a.1"], ["a.{0-1}", "b.0"]),
        (["m.w1", "m.w3"], ["m.w1", "m.w3"]),
        (["(root)"], ["(root)"]),
        (
            [f"h.{i}.experts.{k}.up" for i in range(2) for k in range(4)],
            ["h.{0-1}.experts.{0-3}.up"],
        ),
        (
            ["h.0.experts.0.up", "h.0.experts.1.up", "h.1.experts.1.up"],
            ["h.0.experts.0.up", "h.{0-1}.experts.1.up"],
        ),
        ([], []),
    ),
    ids=str,
)
def test_names_of_equal_layers_are_gathered_word_by_word(
    names: list[str], expected: list[str]
) -> None:
    assert gathered(names) == expected


def test_every_name_can_be_searched_for(report: Report) -> None:
    text = str(report)
    for name in ("layers.{0-2}.gate_proj", "layers.{0-2}.up_proj", "layers.{0-2}.dropped"):
        assert name in text
        assert name in wide(report)
    many = nn.ModuleDict({f"proj_{name}": Layer() for name in "abcdefgh"})

    def run(x: Tensor) -> Tensor:
        return torch.stack([layer((x * i).sin()) for i, layer in enumerate(many.values())]).sum()

    text = str(runlora_fx.explain(run, data(256), objective="flops", strict=True))
    assert all(f"proj_{name}" in text for name in "abcdefgh")


# --- the table and its formulas


def test_a_report_begins_with_what_matters(report: Report) -> None:
    head, rest = str(report).split("\n\n", 1)
    first, *summary = head.splitlines()
    assert first == f"runlora: {report.verdict}"
    assert first.startswith("runlora: 6 of 9 adapted layers rewritten: ")
    assert summary[0].startswith("3 layers left alone (dropout): ")
    assert summary[0].endswith("; set lora_dropout=0 if the training allows it.")
    assert summary[-1].startswith("Matrix products of the joint graph: ")
    assert rest.startswith("row  layers  sizes")
    assert str(report).count("N tokens, i inputs") == 1


def test_every_site_is_in_one_row(report: Report) -> None:
    rows = rows_of(report.sites)
    assert [site for row in rows for site in row.sites] != []
    assert sum(len(row.sites) for row in rows) == len(report)
    assert [row.number for row in rows] == [*range(1, len(rows) + 1)]
    assert sum(row.layers for row in rows) == 9


@pytest.mark.parametrize("breaks", (False, True))
def test_no_formula_is_printed_twice(breaks: bool) -> None:
    model = Model(breaks)
    text = str(runlora_fx.explain(model, data(256), objective="flops", strict=True))
    bodies = text.split("\nOrder ")[1:]
    for body in bodies:
        formulas = Counter(
            line.strip() for line in body.splitlines() if line.startswith("    ") and " = " in line
        )
        assert formulas
        assert set(formulas.values()) == {1}
    assert len({body.split("\n", 1)[1] for body in bodies}) == len(bodies)
    assert "layers.{0-2}.dropped" in text


def test_what_is_as_before_stands_for_the_same_value() -> None:
    before = "Z = X A'\nY = X W' + Z B'\ndB = dY' Z\ndX = dY W"
    after = "Y = X (W' + A' B')\nZ = dY' X\ndB = dY' Z\ndX = dY W"
    new, kept = changes(before, after)
    assert kept == ["dX"]  # Z is another value there, so dB is too
    assert new == after.splitlines()[:-1]
    assert changes(before, before) == ([], ["Z", "Y", "dB", "dX"])


def test_layers_that_came_alike_share_formulas_whatever_was_done_with_them() -> None:
    layers = nn.ModuleList([Layer(), Layer()])

    def run(x: Tensor, y: Tensor) -> Tensor:
        return layers[0](x).sum() + layers[1](y).sum()

    text = str(runlora_fx.explain(run, data(256), data(8), objective="flops", strict=True))
    assert "Order a: 2 layers in rows 1 and 2\n  as it came: " in text
    assert text.count("Y = X W' + Z B'") == 1
    assert "  after, row 1: " in text
    assert "left alone: tokens" in text


def test_the_base_product_is_shown_beside_an_adapter_with_dropout(report: Report) -> None:
    text = str(report)
    base = "  base product, runs as it came and is added to Y: 786.4 kFLOP\n    Y0 = X0 W'\n"
    assert f"Order b: 3 layers in row 2\n{base}" in text
    assert "X0 and Y0 input and result of the base product" in text


def test_units() -> None:
    assert quantity(1_024_000, "FLOP") == "1.024 MFLOP"
    assert quantity(3e18, "B") == "3000 PB"
    assert [duration(s) for s in (80.0, 1.0, 0.013, 2.5e-6, 1e-9)] == [
        *("80 s", "1.0 s", "13 ms", "2.5 us", "1.0 ns")
    ]
    assert (count(1, "layer"), count(0, "layer")) == ("1 layer", "0 layers")


# --- rich text


def test_plain_text_has_no_codes_and_rich_text_has_a_table(report: Report) -> None:
    assert "\x1b" not in str(report)
    shown = wide(report)
    assert report.verdict in shown
    assert "left alone (dropout)" in shown
    assert "┃" in shown and "modules" in shown
    assert shown.count("changed") >= 1
    rich.print(report, file=io.StringIO())


def test_rich_text_cuts_no_name_and_reads_no_markup(report: Report) -> None:
    names = ("[red]layers.0.a_module_whose_name_is_long[/red]", "layers.1.another")
    own = Report("joint", (replace(report.sites[0], modules=names),))
    console = Console(file=io.StringIO(), width=80)
    console.print(own)
    assert isinstance(console.file, io.StringIO)
    assert f"row 1: {', '.join(names)}" in console.file.getvalue()
    assert all(name in wide(own) for name in names)


# --- when planning pays back


@pytest.mark.parametrize(
    ("planning", "seconds", "steps", "words"),
    (
        (0.8, (0.113, 0.1), 62, "Planning took 0.8 s".replace("0.8 s", "800 ms")),
        (
            2.0,
            (0.2, 0.1),
            20,
            "it pays back after about 20 steps (predicted gain of 100 ms a step)",
        ),
        (0.001, (2.0, 1.0), 1, "it pays back after one step"),
        (1234.0, (2.0, 1.0), 1234, "about 1200 steps"),
        (2.0, (0.1, 0.1), None, ""),
        (2.0, None, None, ""),
        (None, (0.2, 0.1), None, ""),
    ),
    ids=str,
)
def test_pay_back_is_measured_time_over_predicted_gain(
    planning: float | None, seconds: Any, steps: int | None, words: str, report: Report
) -> None:
    own = Report("joint", report.sites, planning_seconds=planning, seconds=seconds)
    assert own.steps_to_pay_back == steps
    assert json.loads(own.to_json())["steps_to_pay_back"] == steps
    assert ("Planning took" in str(own)) == bool(words)
    assert words in str(own) and words in wide(own)
    if words:
        assert "(measured)" in str(own) and "predicted gain" in str(own)


def test_the_pass_is_timed_and_times_of_graphs_are_added(report: Report) -> None:
    assert report.planning_seconds is not None and report.planning_seconds > 0
    assert report.steps_to_pay_back is not None
    parts = [Report("joint", planning_seconds=t) for t in (1.0, 2.0)]
    assert combined(parts).planning_seconds == 3.0
    assert combined([*parts, Report("joint")]).planning_seconds is None
    assert parts[0] == parts[1]  # a measured time jitters, so it does not tell reports apart
