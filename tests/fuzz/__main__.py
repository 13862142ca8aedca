"""The command: ``python -m tests.fuzz --cases 2000 --seed 0 [--dynamic] [--level joint]``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.progress import Progress

from tests.fuzz import run
from tests.fuzz.case import Case
from tests.fuzz.generate import random_case
from tests.fuzz.levels import LEVELS, Level
from tests.fuzz.run import Failure, outcome_of
from tests.fuzz.shrink import script, shrunk

#: One of how many programs is run at the levels that take long to trace.
_RARE: dict[Level, int] = {"export": 4}


def main() -> int:
    """Run cases; the number of failures, at most 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=200, help="how many programs")
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--dynamic", action="store_true", help="all sizes dynamic")
    parser.add_argument("--level", choices=LEVELS, action="append", help="default: all")
    parser.add_argument("--found", type=Path, help="folder for a script per cause")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument(
        "--seconds", type=float, default=run.TIME_LIMIT, help="of CPU that a program may take"
    )
    parser.add_argument("--stop-after", type=float, help="seconds; no case begins later")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    run.TIME_LIMIT = asked.seconds
    levels = asked.level or [level for level in LEVELS if not (asked.dynamic and level == "torch")]
    counts: Counter[str] = Counter()
    causes: Counter[str] = Counter()
    begin, started = time.process_time(), time.monotonic()
    # The bar is drawn on a terminal only.
    console = Console(stderr=True)
    with Progress(
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),
    ) as progress:
        seeds = range(asked.seed, asked.seed + asked.cases)
        for seed in progress.track(seeds, description="programs"):
            if asked.stop_after is not None and time.monotonic() - started > asked.stop_after:
                print(f"stopped after {seed - asked.seed} programs")
                break
            case = random_case(seed)
            for level in levels:
                if not asked.level and seed % _RARE.get(level, 1):
                    continue
                outcome = outcome_of(case, level, dynamic=asked.dynamic)
                counts[f"{level} run"] += 1
                counts[f"{level} changed"] += outcome.changed
                counts[f"{level} skipped"] += outcome.skipped
                counts[f"{level} failed"] += outcome.failure is not None
                if outcome.failure is not None:
                    cause = outcome.failure.cause
                    causes[cause] += 1
                    print(f"seed {seed}: {cause} ({level})", flush=True)
                    if causes[cause] == 1 and not asked.no_shrink:
                        _show(case, level, outcome.failure, asked.dynamic, asked.found, seed)
    for level in levels:
        ran = counts[f"{level} run"]
        share = counts[f"{level} changed"] / max(ran, 1)
        rest = ", ".join(f"{counts[f'{level} {what}']} {what}" for what in ("skipped", "failed"))
        print(f"{level}: {ran} run, {share:.0%} changed, {rest}")
    for cause, count in causes.most_common():
        print(f"{count} x {cause}")
    print(f"{time.process_time() - begin:.0f} s of CPU")
    return min(1, sum(causes.values()))


def _show(
    case: Case, level: Level, failure: Failure, dynamic: bool, folder: Path | None, seed: int
) -> None:
    """Shrink a failing case and print it as a script."""

    def fails(smaller: Case) -> bool:
        found = outcome_of(smaller, level, dynamic=dynamic, excuses=False).failure
        return found is not None and found.cause == failure.cause

    small = shrunk(case, fails, effort=40 if failure.kind == "slow" else 150)
    last = outcome_of(small, level, dynamic=dynamic).failure or failure
    written = script(small, level, dynamic=dynamic, text=f"seed {seed}\n{last.cause}\n{last.text}")
    print(written, flush=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        kind = "dynamic" if dynamic else "static"
        (folder / f"{level}_{kind}_{seed}.py").write_text(written)


if __name__ == "__main__":
    sys.exit(main())
