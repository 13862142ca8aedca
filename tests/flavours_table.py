"""The table of `docs/flavours.md`: its rows from what was measured, and back from the text."""

from dataclasses import astuple, dataclass, fields
from pathlib import Path

import peft
import torch
from checks import matmul_flops
from optimizer_steps import STEPS as OPTIMIZER_STEPS
from optimizer_steps import traced
from registry import FLAVOURS
from trainings import STEPS, Trained

import runlora_fx

TABLE = Path(__file__).parent.parent / "docs" / "flavours.md"

#: What the numbers depend on: what Dynamo traces, what the partitioner saves, how PEFT computes.
VERSIONS = f"torch {torch.__version__.split('+')[0]}, PEFT {peft.__version__}"

HEADS = (
    "flavour",
    "from",
    "graphs, Inductor / runlora",
    "graph breaks, Inductor / runlora",
    "sites, rewritten / found",
    "products, kFLOP",
    "saved, KiB",
    "result",
)


@dataclass(frozen=True)
class Row:
    """One flavour, as it is printed."""

    flavour: str
    source: str
    graphs: str
    breaks: str
    sites: str
    products: str
    saved: str
    result: str

    def __str__(self) -> str:
        """A line of a Markdown table."""
        return f"| {' | '.join(astuple(self))} |"


def row(name: str, inductor: Trained, ours: Trained) -> Row:
    """The row of a flavour."""
    changed, found = ours.matched
    return Row(
        flavour=name,
        source=FLAVOURS[name].source,
        graphs=f"{inductor.graphs[-1]} / {ours.graphs[-1]}",
        breaks=f"{inductor.breaks} / {ours.breaks}",
        sites=f"{changed} / {found}",
        products=_change(inductor.products / STEPS / 1e3, ours.products / STEPS / 1e3),
        saved=_change(inductor.saved / 1024, ours.saved / 1024),
        result=_result(name, inductor.products, ours.products),
    )


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, with what they depend on."""
    lines = [
        f"{VERSIONS}:",
        "",
        f"| {' | '.join(HEADS)} |",
        "|---" * len(HEADS) + "|",
        *map(str, rows),
    ]
    return "\n".join(lines) + "\n"


def parse(text: str) -> dict[str, Row]:
    """The rows of a document, by flavour."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    found = [Row(*row) for row in cells if len(row) == len(fields(Row)) and row[0] != HEADS[0]]
    return {row.flavour: row for row in found}


def _change(before: float, after: float) -> str:
    return f"{before:,.0f} -> {after:,.0f}" if round(before) != round(after) else f"{after:,.0f}"


def _result(name: str, before: int, after: int) -> str:
    flavour = FLAVOURS[name]
    if flavour.expects == "gain":
        return f"fewer FLOPs: {(after - before) / before:+.1%}"
    kind = {"bytes": "fewer bytes held", "alone": "left alone"}[flavour.expects]
    return f"{kind}: {flavour.why}"


STEP_HEADS = ("step", "from", "products, FLOP", "result")


def step_rows() -> list[tuple[str, ...]]:
    """What `rewrite` makes of the steps of optimizers, in FLOPs of their products."""
    rows = []
    for name, step in OPTIMIZER_STEPS.items():
        gm, inputs = traced(step)
        before = matmul_flops(gm.graph)
        after = matmul_flops(runlora_fx.rewrite(gm, inputs, strict=True).graph)
        less = f"fewer FLOPs: {(after - before) / before:+.1%}"
        rows.append((name, step.source, _change(before, after), less))
    return rows


def step_table() -> str:
    """The rows as a Markdown table."""
    rows = [STEP_HEADS, ("---",) * len(STEP_HEADS), *step_rows()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def parse_steps(text: str) -> list[tuple[str, ...]]:
    """The rows of a document."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [tuple(cell.strip() for cell in line.strip("| ").split(" | ")) for line in lines]
    return [row for row in cells if row[0] in OPTIMIZER_STEPS]
