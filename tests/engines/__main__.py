"""The command: ``python -m tests.engines [ENGINE...]``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.engines.cases import ENGINES
from tests.engines.launch import Outcome, run

COLUMNS = (
    *("engine", "processes", "graphs", "sites rewritten", "sizes of the first site"),
    "kept for the backward by rank 0, and under Inductor [B]",
    "what plans of products keep less [B]",
    "problems",
)


def row(found: Outcome) -> str:
    """A row of the table."""
    processes = str(ENGINES[found.engine].ranks)
    if not found.ranks:
        return f"| {found.engine} | {processes} | | | | | | {'; '.join(found.problems)} |"
    ours = found.ours
    sites = ours["sites"]
    changed = sum(site["changed"] for site in sites)
    inductors = found.ranks[0].get("inductor", {}).get("kept", 0)
    bytes_kept = f"{ours['kept']:,}, {inductors:,}" if inductors else "not compared"
    less = sum(site["saved"][0] - site["saved"][1] for site in sites)
    cells = (
        *(found.engine, processes, str(ours["graphs"]), f"{changed} of {len(sites)}"),
        *(sites[0]["shapes"] if sites else "", bytes_kept, f"{less:,}"),
        "; ".join(found.problems) or "none",
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Run engines and print a table; 1 if one has a problem."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines", description=__doc__)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--keep", type=Path, help="a folder for logs and what ranks wrote")
    asked = parser.parse_args()
    unknown = set(asked.engines) - set(ENGINES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    is_bad = False
    for name in asked.engines or ENGINES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = asked.keep / name if asked.keep else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            found = run(name, folder)
        print(row(found), flush=True)
        is_bad |= bool(found.problems)
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
