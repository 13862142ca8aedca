"""Copies the tables of benchmarks/results/ into the pages, between their markers.

    python docs/make_benchmarks.py

A table stands between ``<!-- table: field_paper -->`` and ``<!-- end -->``. It is what a benchmark
wrote, with headings two levels deeper.

Invariant: nothing but what stands between markers changes.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "numerics.md")
RESULTS = ROOT / "benchmarks" / "results"

_TABLE = re.compile(r"(<!-- table: ([\w/]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """A page with the tables of the results that its markers name.

    Raises:
        FileNotFoundError: If there is no result of a name.
    """

    def table(found: re.Match[str]) -> str:
        content = (RESULTS / f"{found[2]}.md").read_text(encoding="utf-8").strip()
        deeper = re.sub(r"^(#+) ", r"##\1 ", content, flags=re.MULTILINE)
        return f"{found[1]}{deeper}\n{found[3]}"

    return _TABLE.sub(table, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
