"""The table of `docs/flavours.md`: its rows from what was measured, and back from the text."""

from dataclasses import astuple, dataclass, fields
from pathlib import Path

import peft
import torch
from registry import FLAVOURS
from trainings import STEPS, Trained

TABLE = Path(__file__).parent.parent / "docs" / "flavours.md"

#: What the numbers depend on: what Dynamo traces, what the partitioner saves, how PEFT computes.
VERSIONS = f"torch {torch.__version__.split('+')[0]}, PEFT {peft.__version__}"

HEADS = (
    "flavour",
    "from",
    "graphs, Inductor / runlora",
    "graph breaks",
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
        breaks=str(ours.breaks),
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
