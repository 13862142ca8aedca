"""Findings: the result of one check, and how all of them are shown.

    Finding("compiler", "C++", "problem", "no compiler", "install g++ ...")

Invariant: a finding that is not ok says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from rich.table import Table
from rich.text import Text

State: TypeAlias = Literal["ok", "warning", "problem"]

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        area: The subject, such as ``"caches"``.
        name: What was looked at.
        state: ``"problem"`` if runlora cannot work, or not as meant, until something is done;
            ``"warning"`` if something costs speed or memory, or was never tried.
        text: What was found.
        remedy: What to do; empty if nothing.
    """

    area: str
    name: str
    state: State
    text: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """The finding as plain data."""
        return asdict(self)


def verdict(findings: Sequence[Finding]) -> str:
    """How many problems and warnings there are, in a line."""
    problems = sum(finding.state == "problem" for finding in findings)
    warnings = sum(finding.state == "warning" for finding in findings)
    if not problems and not warnings:
        return "No problem found."
    return f"{_count(problems, 'problem')}, {_count(warnings, 'warning')}."


def table(findings: Sequence[Finding]) -> Table:
    """All findings, each with what to do."""
    shown = Table(box=None, pad_edge=False)
    for column in ("", "area", "what", "found"):
        shown.add_column(column, overflow="fold", no_wrap=column in ("", "area"))
    area = ""
    for finding in findings:
        state = Text(finding.state, style=_STYLES[finding.state])
        remedy = f"\n-> {finding.remedy}" if finding.remedy else ""
        first = finding.area if finding.area != area else ""
        shown.add_row(state, first, Text(finding.name), Text(f"{finding.text}{remedy}"))
        area = finding.area
    return shown


def _count(n: int, name: str) -> str:
    return f"{n} {name}" if n == 1 else f"{n} {name}s"
