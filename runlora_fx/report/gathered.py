"""Gathered names: those of equal layers as one.

    layers.0.q_proj, layers.1.q_proj, layers.3.q_proj    ->    layers.{0-1,3}.q_proj

Invariant: every name is in exactly one gathered name, and every word of it can be searched for.
Only parts that are numbers are gathered, so ``w1`` and ``w3`` stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

#: A name by its parts: words, and the numbers that a part stands for.
_Parts: TypeAlias = tuple[str | frozenset[int], ...]


def gathered(names: Iterable[str]) -> list[str]:
    """Module names, of which those that differ by one of their numbers alone are one."""
    found = list(dict.fromkeys(map(_parts, names)))
    for position in range(max(map(len, found), default=0)):
        found = _merged(found, position)
    return [".".join(map(_text, parts)) for parts in found]


def _parts(name: str) -> _Parts:
    parts = name.split(".")
    return tuple(frozenset([int(p)]) if p.isascii() and p.isdecimal() else p for p in parts)


def _merged(names: list[_Parts], position: int) -> list[_Parts]:
    """Names that differ at a position alone, where all have numbers, as one."""
    by_rest: dict[object, list[_Parts]] = {}
    for parts in names:
        is_number = len(parts) > position and isinstance(parts[position], frozenset)
        rest = (parts[:position], parts[position + 1 :], len(parts)) if is_number else parts
        by_rest.setdefault((is_number, rest), []).append(parts)
    merged: list[_Parts] = []
    for equal in by_rest.values():
        first = equal[0]
        if len(equal) == 1:
            merged.append(first)
            continue
        numbers: frozenset[int] = frozenset()
        for parts in equal:
            own = parts[position]
            assert isinstance(own, frozenset)
            numbers |= own
        merged.append((*first[:position], numbers, *first[position + 1 :]))
    return merged


def _text(part: str | frozenset[int]) -> str:
    """A part of a name: a word, ``2``, or ``{0-3,5}``."""
    if isinstance(part, str):
        return part
    runs: list[list[int]] = []
    for number in sorted(part):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return text if len(part) == 1 else f"{{{text}}}"
