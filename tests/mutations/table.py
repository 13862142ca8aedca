"""The table of docs/reliability.md: by mistake and graph, how many mistakes were made and caught.

| lost scale | 6 | 10 | ... |       all were caught
| wrong mask | · | · | 4 | ...      nothing there to mistake
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from tests.mutations.run import ALL

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"

_BEGIN, _END = "<!-- mutations: begin -->", "<!-- mutations: end -->"


class Counts(dict[tuple[str, str], Counter[str]]):
    """By mistake and graph, how often each outcome came."""


def table(found: Counts) -> str:
    """Counts as Markdown."""
    graphs = list(dict.fromkeys(graph for _, graph in found))
    lines = [f"| mistake | {' | '.join(graphs)} |", f"|---|{'---|' * len(graphs)}"]
    for mistake in ALL:
        cells = [_cell(found[mistake, graph]) for graph in graphs]
        lines.append(f"| {mistake} | {' | '.join(cells)} |")
    whole = sum(found.values(), Counter[str]())
    caught, same = whole["caught"], whole["same"]
    others = sum(whole.values()) - caught - same
    lines += [
        "",
        f"{caught} mistakes were caught, {others} were not. {same} more change no result.",
    ]
    return "\n".join(lines)


def _cell(counts: Counter[str]) -> str:
    """How many mistakes were caught, of how many that change a result."""
    caught, made = counts["caught"], sum(counts.values()) - counts["same"]
    if not made:
        return "·"
    return str(caught) if caught == made else f"**{caught} of {made}**"


def replaced(page: str, text: str) -> str:
    """A page with another table."""
    begin, end = page.index(_BEGIN) + len(_BEGIN), page.index(_END)
    return f"{page[:begin]}\n{text}\n{page[end:]}"


def rows_of(page: str) -> dict[str, list[str]]:
    """The cells of the table of a page, by mistake; and the graphs by "mistake"."""
    part = page[page.index(_BEGIN) : page.index(_END)]
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in part.splitlines() if "|" in line]
    return {name: cells for name, *cells in rows if not name.startswith("---")}
