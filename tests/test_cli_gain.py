"""`runlora gain`: counts that are known, and what it says about them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runlora_fx.__main__ import main
from runlora_fx.aot import Parts
from runlora_fx.cli import gain as command
from runlora_fx.cli.gain import Gain, saved_bytes
from runlora_fx.options import Options
from runlora_fx.report.data import Report
from runlora_fx.report.sites import Cause, Site
from runlora_fx.trace import explained


def few(layers: Any) -> Iterator[tuple[str, Any, bool]]:
    """A small layer, trained and used."""
    recipe = layers.Recipe(shape="SmolLM2-135M", rows=2, length=1024)
    yield "no dropout", recipe, False
    yield "inference", recipe, True


def test_a_row_for_every_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_cases", few)
    assert main(["gain", "--device", "h100", "--json"]) == 0
    shown = capsys.readouterr()
    assert not shown.err
    found = json.loads(shown.out)
    assert found["planned_for"].startswith("H100")
    training, inference = (Gain(**row) for row in found["gains"])
    assert training.saved[1] < training.saved[0]
    assert training.time_change is not None
    assert training.time_change < 0
    assert training.advice == "use it: saves time and memory"
    assert tuple(inference.saved) == (0, 0)
    assert inference.flops[1] <= inference.flops[0]


def test_the_table_says_what_is_counted_and_what_is_predicted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        Gain("Llama-3-8B", "no dropout", -0.094, (7211, 7201), (1_076_700_000, 707_600_000), "use"),
        Gain("Llama-3-8B", "inference", None, (1000, 1000), (0, 0), "little to gain"),
    ]
    given = iter(rows)
    monkeypatch.setattr(command, "_cases", few)
    monkeypatch.setattr(command, "_gain", lambda *args, **kwargs: next(given))
    assert main(["gain", "--device", "h100"]) == 0
    shown = capsys.readouterr().out
    for words in ("time, predicted", "saved, counted", "FLOPs, counted", "-9.4%", "nothing"):
        assert words in shown
    assert "1076.7 -> 707.6 MB" in shown
    assert "Planned for H100 SXM5 80 GB (rates of the NVIDIA H100 datasheet)" in shown


class Lora(nn.Module):
    """One adapted layer and a non-linear reader."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(64, 64, bias=False).requires_grad_(False)
        self.down = nn.Linear(64, 4, bias=False)
        self.up = nn.Linear(4, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


def test_saved_bytes_are_counted_on_both_sides() -> None:
    seen: list[tuple[int, int]] = []

    def compare(came: Parts, runs: Parts) -> None:
        seen.append((saved_bytes(came), saved_bytes(runs)))

    with torch.device("meta"):
        x = torch.empty(512, 64, requires_grad=True)
        report = explained(Lora(), (x,), {}, Options(objective="flops"), compare)
    (site,) = report.sites
    assert site.changed
    # As it came, X A' is saved. Merged, nothing is.
    assert seen == [(512 * 4 * 4, 0)]


def test_advice_names_the_remedy_first() -> None:
    cause = Cause("dropout", "why", "set lora_dropout=0")
    site = Site((), "", "", "", 1, 1, 1, 1, False, "left alone", find_causes=lambda: (cause,))
    advice = command._advice
    assert advice(Report("joint", (site,)), -0.1, (100, 50)) == "set lora_dropout=0"
    assert advice(Report("joint"), -0.1, (100, 100)) == "use it: saves time"
    assert advice(Report("joint"), None, (100, 90)) == "use it: saves memory"
    assert advice(Report("joint"), -0.001, (0, 0)) == "little to gain"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--device", "h1000"], "'h100'"), (["--layer", "GPT"], "'Llama-3-8B'")],
    ids=["device", "layer"],
)
def test_mistakes_get_an_answer(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["gain", *arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
