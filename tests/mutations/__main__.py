"""The command: ``python -m tests.mutations [--strict] [--graph NAME] [--write]``."""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.mutations.graphs import GRAPHS
from tests.mutations.run import ALL, outcomes
from tests.mutations.table import PAGE, Counts, replaced, table


def main() -> int:
    """Make all mistakes and print the table; 1 if one was not caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--strict", action="store_true", help="with probes, and errors")
    parser.add_argument("--graph", choices=GRAPHS, action="append", help="default: all")
    parser.add_argument("--every", type=int, default=3, help="only every such place")
    parser.add_argument("--write", action="store_true", help=f"the table into {PAGE.name}")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    begin, found, bad = time.process_time(), Counts(), 0
    for name in asked.graph or GRAPHS:
        came = GRAPHS[name]()
        for mistake in ALL:

            def see(
                outcome: str, place: int, variant: int, where: str = f"{name}: {mistake}"
            ) -> None:
                nonlocal bad
                if outcome not in ("caught", "same"):
                    bad += 1
                    print(f"{where} ({place}, {variant}): {outcome}", file=sys.stderr, flush=True)

            found[mistake, name] = outcomes(
                came, mistake, strict=asked.strict, every=asked.every, see=see
            )
        print(f"{name}: {time.process_time() - begin:.0f} s of CPU", file=sys.stderr, flush=True)
    text = table(found)
    print(text)
    if asked.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(replaced(page, text), encoding="utf-8")
    return min(1, bad)


if __name__ == "__main__":
    sys.exit(main())
