"""`runlora crossover`: its problem, winners, formulas and names against the pass itself."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import sympy
import torch
from torch import Tensor, nn

import runlora_fx
from runlora_fx import aot
from runlora_fx.__main__ import main
from runlora_fx.cli.crossover.borders import borders
from runlora_fx.cli.crossover.contenders import Contender, contenders, winners
from runlora_fx.cli.crossover.fields import Basis, Field, Layer, axes, field_of
from runlora_fx.cli.crossover.variants import variants_of
from runlora_fx.cost_model.devices.machine import key_of
from runlora_fx.cost_model.objective import Objective
from runlora_fx.cost_model.published import profiles_of
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.read.analysis import Analysis
from runlora_fx.passes.search.decide import decide

FLOPS = Basis("FLOPs", "counted", Objective("flops"))
H100 = Basis("time", "predicted", Objective("time", profile=profiles_of("h100")["float32"]))
SHAPES = [(96, 160, 8), (64, 64, 4), (160, 96, 64)]


class Lora(nn.Module):
    """``x W' + 2 (x A') B'``."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


def traced(
    inputs: int, outputs: int, rank: int, tokens: int, patch: pytest.MonkeyPatch
) -> tuple[Problem, runlora_fx.Report]:
    """The problem that the pass reads of a layer, and the report of it by FLOPs."""
    problems: list[Problem] = []
    run = aot.run

    def see(graph: torch.fx.Graph, *args: object, **kwargs: object) -> object:
        problems.extend(posed.problem for posed in Analysis(graph, ATEN).posed)
        return run(graph, *args, **kwargs)

    with patch.context() as inner, torch.device("meta"):
        inner.setattr(aot, "run", see)
        x = torch.empty(tokens, inputs, requires_grad=True)
        report = runlora_fx.explain(Lora(inputs, outputs, rank), x, objective="flops")
    (problem,) = problems
    return problem, report


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_problem_is_the_one_that_the_pass_reads_of_a_traced_layer(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, outputs, rank = shape
    problem, report = traced(*shape, 512, monkeypatch)
    layer = Layer(inputs, outputs, "float32")
    assert layer.problem(512, rank) == problem
    # And so the break-even is what the report says.
    (site,) = report.sites
    field = field_of(layer, FLOPS, (512,), (rank,))
    assert field.break_even(rank) == site.break_even
    (contender,) = contenders([field])[1:]
    assert contender.steps(problem) == site.after
    assert contender.flops(problem) == site.flops_after_expr


def whole(layer: Layer, basis: Basis, rank: int = 8, tokens_max: int = 4096) -> Field:
    return field_of(layer, basis, *axes(layer, rank, tokens_max))


@pytest.mark.parametrize("basis", [FLOPS, H100], ids=lambda basis: basis.title)
def test_a_winner_is_what_the_pass_decides(basis: Basis) -> None:
    field = field_of(Layer(256, 512, "float32"), basis, (16, 300, 700, 4096), (8, 64))
    for rank, row in zip(field.ranks, field.decisions, strict=True):
        for tokens, decision in zip(field.tokens, row, strict=True):
            whole_decision = decide(field.layer.problem(tokens, rank), basis.objective)
            assert decision.plan == whole_decision.plan
            assert decision.changed == whole_decision.changed


def test_formulas_by_flops_are_those_of_the_algebra() -> None:
    field = whole(Layer(256, 512, "float32"), FLOPS)
    known = contenders([field])
    found = {(b.below, b.above): b for b in borders(field, known, 8)}
    # The forward is merged first, from N = i on, then the backward, from N = o on.
    variants = ["forward1, backward1", "forward2, backward1", "forward2, backward5"]
    assert [contender.variants for contender in known[:3]] == variants
    assert found["A", "B"].formula == "i"
    assert found["B", "C"].formula == "o"
    square = whole(Layer(256, 256, "float32"), FLOPS)
    known = contenders([square])
    merged = {contender.variants: contender.letter for contender in known}
    pays = {border.above: border for border in borders(square, known, 8) if border.below == "A"}
    border = pays[merged["forward2, backward5"]]
    assert sympy.sympify(border.formula) == sympy.sympify("2*i*o/(i + o)")
    assert border.at_rank == 256


@pytest.mark.parametrize("basis", [FLOPS, H100], ids=lambda basis: basis.title)
def test_plans_cost_the_same_at_their_border(basis: Basis) -> None:
    field = whole(Layer(768, 512, "float32"), basis, tokens_max=16384)
    known = contenders([field])
    found = borders(field, known, 16)
    assert found
    letters = {contender.letter: contender for contender in known}
    for border in found:
        at = round(border.at_rank)
        prices = [price(field, letters[x], at, 16) for x in (border.below, border.above)]
        assert prices[0] == pytest.approx(prices[1], rel=2e-3)
        # With twice as many tokens the second plan costs less.
        more = [price(field, letters[x], 2 * at, 16) for x in (border.below, border.above)]
        assert more[1] < more[0]
        numbers = {"i": 768, "o": 512, "r": 16}
        value = sympy.sympify(border.formula).subs(numbers)
        assert float(value) == pytest.approx(border.at_rank, rel=1e-2)


def price(field: Field, contender: Contender, tokens: int, rank: int) -> float:
    """The FLOPs of a plan, or its predicted time."""
    problem = field.layer.problem(tokens, rank)
    if field.basis.objective.name == "flops":
        sizes = dict(zip("Nior", problem.dims, strict=True))
        formula = contender.flops(problem)
        return float(formula.subs({s: sizes[s.name] for s in formula.free_symbols}))
    from runlora_fx.passes.algebra.plan import incoming_operations

    plan = contender.plan
    operations = incoming_operations(problem) if plan is None else plan.operations(problem)
    return float(field.basis.objective.total(operations))


def test_variants_are_named_by_the_order_of_contraction() -> None:
    """A high rank makes the gradient of the whole weight worth it: backward4."""
    layer = Layer(256, 512, "float32")
    field = field_of(layer, FLOPS, (16, 4096), (8, 256))
    by_rank = [
        [variants_of(layer.problem(1, 8), d.plan if d.changed else None) for d in row]
        for row in field.decisions
    ]
    assert by_rank == [
        ["forward1, backward1", "forward2, backward5"],
        ["forward1, backward1", "forward2, backward4"],
    ]


def test_every_cell_has_the_letter_of_a_plan() -> None:
    field = whole(Layer(128, 256, "float32"), FLOPS)
    known = contenders([field])
    rows = winners(field, known)
    assert len(rows) == len(field.ranks)
    assert {len(row) for row in rows} == {len(field.tokens)}
    assert set("".join(rows)) == {contender.letter for contender in known}


# --- the command

SMALL = ["crossover", "--in", "64", "--out", "64", "--rank", "8", "--dtype", "float32"]


def test_the_picture_the_plans_and_the_formulas_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SMALL, "--tokens-max", "512", "--device", "h100"]) == 0
    shown = capsys.readouterr()
    assert not shown.err
    assert re.search(r"^ +8 A (A )*B", shown.out, re.MULTILINE)
    for words in ("FLOPs", "counted", "predicted", "M = W + 2 B A", "backward5", "2*i*o/(i + o)"):
        assert words in shown.out
    # The machine of the tests has a measured profile: its field stands beside that of the H100.
    assert "rates that `runlora calibrate` measured" in shown.out
    assert "A report says at rank 8: merging the adapter pays when N > 63" in shown.out


def test_json_has_fields_plans_and_borders(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--tokens-max", "256", "--json", "--memory", "low"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layer"] == {"inputs": 64, "outputs": 64, "dtype": "float32"}
    assert found["plans"][0]["letter"] == "A"
    for field in found["fields"]:
        assert len(field["winners"]) == len(field["ranks"])
        assert field["merging_pays"]
    assert found["measured"] == []


def test_products_are_measured(capsys: pytest.CaptureFixture[str], no_profile: Path) -> None:
    assert main([*SMALL, "--tokens-max", "256", "--measure", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    letters = {plan["letter"] for plan in found["plans"]}
    assert 1 <= len(found["measured"]) <= 4
    for point in found["measured"]:
        assert point["seconds"].keys() == letters
        assert all(seconds > 0 for seconds in point["seconds"].values())
        assert point["fastest"] in letters
    # A look measures for itself, and stores nothing.
    assert not (no_profile / key_of(torch.device("cpu"), "float32").file_name).exists()


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
def test_a_drawing_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.png"
    assert main([*SMALL, "--tokens-max", "128", "--save", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "Plans" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--in", "0"], "--in must be at least 1, got 0"),
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--tokens-max", "1"], "--tokens-max must be at least 32, got 1"),
        (["--dtype", "int8"], "'bfloat16'"),
        (["--device", "h1000"], "h100"),
        (["--memory", "fast"], "'balanced'"),
        (["--measure", "--device", "h100"], "leave --device out"),
        (["--save", "x.jpg"], ".png, .svg, .pdf"),
        (["--save", "no/such/folder/x.png"], "there is no folder"),
        (["--tokens", "1"], "--tokens-max"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_an_answer(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--save" in arguments:
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as stopped:
        main(["crossover", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("runlora_fx.cli.crossover.drawing.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main([*SMALL, "--save", "x.png"])
    assert "runlora-fx[plots]" in capsys.readouterr().err
