"""Mistakes of emission: a sample of those that ``python -m tests.mutations`` makes, all caught.

The table of docs/reliability.md says how many mistakes that command makes and how many are caught.
"""

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from runlora_fx.passes.emit.graph.packed_masks import MaskPacker
from runlora_fx.passes.emit.nodes.claims import holds
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.levels.forms import Broadcast, Copy, DiagonalMultiple, Form, Total
from runlora_fx.passes.read.analysis import Analysis
from tests.mutations.graphs import GRAPHS
from tests.mutations.kinds import MISTAKES
from tests.mutations.run import ALL, OTHERS, are_same, outcomes, places_of, rewritten, values_of
from tests.mutations.table import PAGE, rows_of

#: Of so many places, one is tried here.
EVERY = {"DoRA": 9, "experts": 11, "recompute": 2}

#: The graphs that the table lacks, as the page says.
LACKING = {"stacks"}

#: Of so many places, one is tried for the table.
TABLE = 3


@pytest.mark.parametrize("graph", EVERY)
def test_mistakes_are_caught(graph: str) -> None:
    """One warning, and the right numbers."""
    came, caught = GRAPHS[graph](), 0
    for mistake in ALL:
        counts = outcomes(came, mistake, every=EVERY[graph])
        assert set(counts) <= {"caught", "same"}, (mistake, counts)
        caught += counts["caught"]
    assert caught > 5


@pytest.mark.parametrize("mistake", ("lost scale", "stale leaf", "wrong dtype"))
def test_mistakes_raise_under_strict(mistake: str) -> None:
    counts = outcomes(GRAPHS["plain LoRA"](), mistake, strict=True, every=4)
    assert set(counts) == {"caught"}


@pytest.mark.slow
@pytest.mark.parametrize("graph", GRAPHS)
def test_the_table_is_what_is_found(graph: str) -> None:
    came, rows = GRAPHS[graph](), rows_of(PAGE.read_text(encoding="utf-8"))
    if graph not in rows["mistake"]:
        pytest.skip("the table lacks it")
    column = rows["mistake"].index(graph)
    for mistake in ALL:
        counts = outcomes(came, mistake, every=TABLE)
        assert set(counts) <= {"caught", "same"}, (mistake, counts)
        assert rows[mistake][column] == str(counts["caught"] or "·"), mistake


def test_the_table_has_every_mistake_and_every_graph() -> None:
    rows = rows_of(PAGE.read_text(encoding="utf-8"))
    assert list(rows) == ["mistake", *ALL]
    assert set(rows["mistake"]) == set(GRAPHS) - LACKING
    for mistake in (*MISTAKES, *OTHERS):
        cells = rows[mistake]
        is_made = any(cell.isdigit() for cell in cells)
        assert is_made or mistake == "stack cut elsewhere", f"{mistake} is made nowhere"
        assert all(cell.isdigit() or cell == "·" for cell in cells)


def test_the_table_of_the_smallest_graph_is_what_is_found() -> None:
    came, rows = GRAPHS["in place"](), rows_of(PAGE.read_text(encoding="utf-8"))
    column = rows["mistake"].index("in place")
    for mistake in ALL:
        caught = outcomes(came, mistake, every=TABLE)["caught"]
        assert rows[mistake][column] == str(caught or "·"), mistake


@pytest.mark.parametrize("graph", ("dropout", "per sample"))
def test_without_mistakes_the_graphs_are_rewritten_right(graph: str) -> None:
    came = GRAPHS[graph]()
    made = rewritten(came, strict=True)
    assert made.error is None and not made.said and made.graph is not None
    assert are_same(values_of(came, made.graph), values_of(came, came.module))
    assert places_of(came, "lost scale") > 10


# -- claims ------------------------------------------------------------------------------------


def _graph() -> tuple[Analysis, dict[str, fx.Node]]:
    def calls(m: Tensor, v: Tensor) -> list[Tensor]:
        column, turned = v[:, None], m.permute(1, 0).contiguous()
        return [
            *(m.sum([0], True), m.sum([1], True), m * v, m * column),
            *(v.expand(5, 4), turned.permute(1, 0), turned, column),
        ]

    gm = make_fx(calls, tracing_mode="fake")(torch.randn(4, 4), torch.randn(4))
    names = ("rows", "columns", "by_columns", "by_rows", "expand", "copy", "turned", "column")
    found: dict[str, fx.Node] = dict(zip(names, gm.graph.output_node().args[0], strict=True))  # type: ignore[arg-type, call-overload]
    m, v = gm.graph.find_nodes(op="placeholder")
    return Analysis(gm.graph, ATEN), {**found, "m": m, "v": v}


@pytest.mark.parametrize(
    ("name", "claim", "is_so"),
    (
        ("rows", lambda n: Total(n["m"], True), True),
        ("rows", lambda n: Total(n["m"], False), False),
        ("columns", lambda n: Total(n["m"], False), True),
        ("rows", lambda n: Total(n["v"], True), False),
        ("by_columns", lambda n: DiagonalMultiple(n["m"], n["v"], False), True),
        ("by_columns", lambda n: DiagonalMultiple(n["m"], n["v"], True), False),
        ("by_rows", lambda n: DiagonalMultiple(n["m"], n["column"], True), True),
        ("by_rows", lambda n: DiagonalMultiple(n["m"], n["column"], False), False),
        ("by_rows", lambda n: DiagonalMultiple(n["m"], n["v"], True), False),
        ("expand", lambda n: Broadcast(n["v"]), True),
        ("expand", lambda n: Broadcast(n["column"]), False),
        ("copy", lambda n: Copy(n["m"]), True),
        ("turned", lambda n: Copy(n["m"]), False),
    ),
)
def test_a_claim_holds_if_the_call_computes_it(name: str, claim: object, is_so: bool) -> None:
    analysis, nodes = _graph()
    form = claim(nodes)  # type: ignore[operator]
    assert isinstance(form, Form)
    assert holds(nodes[name], form, ATEN.calls, analysis.reader.values) == is_so


# -- faults of stages that write outside of plans ------------------------------------------------


def test_a_copy_of_a_mask_that_is_none_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the backward recomputes of a mask must make the same calls."""
    copied = MaskPacker._copied

    def other(self: MaskPacker, node: fx.Node, now: dict[fx.Node, fx.Node]) -> fx.Node:
        copy = copied(self, node, now)
        copy.args = (copy.args[0], *[3.0 if isinstance(x, float) else x for x in copy.args[1:]])
        return copy

    came = GRAPHS["recompute"]()
    monkeypatch.setattr(MaskPacker, "_copied", other)
    made = rewritten(came)
    (said,) = made.said
    assert "is no copy of it" in said
    assert made.graph is not None
    assert are_same(values_of(came, made.graph), values_of(came, came.module))
