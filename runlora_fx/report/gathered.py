"""Gathered names: those of equal layers as one.

    layers.0.q, layers.1.q, layers.3.q    ->    layers.{0-1,3}.q

Invariant: every name is in exactly one gathered name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


def gathered(names: Iterable[str]) -> list[str]:
    """Module names, of which those that differ by their first number alone are one."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        head, number, tail = [*re.split(r"(\d+)", name, maxsplit=1), "", ""][:3]
        numbers.setdefault((head, tail), []).extend([int(number)] if number else [])
    return [f"{head}{_runs(which)}{tail}" for (head, tail), which in numbers.items()]


def _runs(numbers: Iterable[int]) -> str:
    """Whole numbers as runs: ``""`` for none, ``2``, ``{0-3,5}``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return text if text.isdigit() or not text else f"{{{text}}}"
