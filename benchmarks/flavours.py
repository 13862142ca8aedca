"""What the backend does to every flavour of LoRA in the tests' registry: writes docs/flavours.md.

    python benchmarks/flavours.py

takes some minutes. Nothing is timed: it counts, with the code that the tests use, and plans for the
fewest FLOPs, so the table is the same on every machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # before this folder: both have a module `flavours`

from checks import INDUCTOR, RUNLORA  # noqa: E402
from flavours_table import TABLE, Row, row, step_table, table  # noqa: E402
from registry import FLAVOURS  # noqa: E402
from rich.progress import track  # noqa: E402
from trainings import compiled  # noqa: E402

BEGIN, END = "<!-- {}: begin -->\n", "<!-- {}: end -->\n"


def main() -> None:
    """Measure every flavour and every step, and replace the tables in the document."""
    replace("steps", step_table())
    replace("flavours", table([measured(name) for name in track(FLAVOURS, "training")]))


def replace(name: str, by: str) -> None:
    """Replace a table of the document."""
    begin, end = BEGIN.format(name), END.format(name)
    head, rest = TABLE.read_text(encoding="utf-8").split(begin)
    tail = rest.split(end)[1]
    TABLE.write_text(head + begin + by + end + tail, encoding="utf-8")
    print(by)


def measured(name: str) -> Row:
    """Train a flavour under both backends."""
    flavour = FLAVOURS[name]
    return row(name, compiled(flavour, INDUCTOR), compiled(flavour, RUNLORA))


if __name__ == "__main__":
    main()
