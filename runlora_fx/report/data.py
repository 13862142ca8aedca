"""Report: what the pass found, what it changed, and why, as data.

One graph -> one :class:`Report`. ``print(report)`` shows it as text, and its attributes are data.

Invariant: the FLOPs of a report are those of all matrix products that were read, also outside of
its sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from runlora_fx.passes.context import NOTHING, Recomputation
from runlora_fx.report.figures.figures import Rates
from runlora_fx.report.sites import Candidate, Refusal, Site
from runlora_fx.report.stored.as_json import as_json
from runlora_fx.report.text.summary import advised, pay_back, steps_to_pay_back, verdict
from runlora_fx.report.text.text import (
    NOTHING_FOUND,
    lines,
    stacked_text,
    total,
    upcast_text,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Candidate", "Refusal", "Report", "Site", "combined"]


@dataclass(frozen=True)
class Report:
    """What one compilation or rewrite did.

    Attributes:
        graph: The kind of graph: ``"joint"``, ``"inference"``, ``"torch"``, or several.
        sites: Where low-rank algebra was found or something was changed, in graph order.
        refusals: What was left alone although it looks like LoRA.
        flops_before: All matrix products of the incoming graph [FLOP].
        flops_after: All matrix products that will run [FLOP].
        from_cache: True if the compiled code came from a cache, so that no graph was seen.
        planned_for: The device that was planned for, if another than the graph runs on.
        stacked: By stack, how many products run as one, because they read the same tensor or are
            added up.
        seconds: The predicted time of all products, before and after [s]; None if plans were ranked
            by FLOPs.
        upcast: How many products of 16-bit matrices run in float32, which is faster on the machine.
        recomputation: What the backward recomputes besides what plans ask for.
        planning_seconds: How long the pass took, measured [s]; None if it was not measured. For a
            report that is stored, with the searches for its causes and break-evens.
        note: If the report of code from a cache is missing, why.
        rates: By dtype, the rates that plans were ranked by; empty if FLOPs ranked them.
        of_other_sizes: True if the code came from a cache and was compiled for other sizes of a
            dynamic graph. The numbers are those of the sizes that it was compiled for.
    """

    graph: str
    sites: tuple[Site, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    flops_before: int = 0
    flops_after: int = 0
    from_cache: bool = False
    planned_for: str = ""
    stacked: tuple[int, ...] = ()
    seconds: tuple[float, float] | None = None
    recomputation: Recomputation = NOTHING
    planning_seconds: float | None = field(default=None, compare=False)
    note: str = ""
    rates: tuple[Rates, ...] = ()
    of_other_sizes: bool = False
    upcast: int = 0

    def __str__(self) -> str:
        """The verdict, what to do, a table of all sites, their formulas, what was left alone."""
        head = [self.headline, *self.summary]
        if self.note:
            return "\n".join([*head, ""])
        return "\n".join([*head, *lines(self.sites, self.refusals), ""])

    def __rich__(self) -> RenderableType:
        """The verdict, what to do, and a table of all sites, for ``rich.print``."""
        # Imported here because few reports are printed so.
        from runlora_fx.report.text.console import as_rich

        return as_rich(self.headline, self.summary, self.sites, self.refusals)

    def __len__(self) -> int:
        """How many sites there are."""
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        """The sites, in graph order."""
        return iter(self.sites)

    def __bool__(self) -> bool:
        """True: a report is something also if it has no site."""
        return True

    def to_json(self, indent: int | None = None) -> str:
        """The report as JSON, with a version of its names under ``"schema"``.

        Args:
            indent: The spaces of an indentation; all in one line if None.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["steps_to_pay_back"] = self.steps_to_pay_back
        return as_json(self.verdict, values, indent)

    def to_html(self) -> str:
        """The report as a web page in one file: tables, drawings of the plans, and plots.

        The page loads nothing from elsewhere. Write it with ``Path(...).write_text(html,
        encoding="utf-8")``.
        """
        from runlora_fx.report.html.page import as_html  # few reports become a page

        return as_html(self, tuple(advised(self.sites, self.recomputation)))

    @property
    def verdict(self) -> str:
        """What was gained, in one line."""
        if self.note:
            return f"the compiled code came from a cache, and {self.note}"
        return verdict(self.sites, self.seconds, self.recomputation)

    @property
    def headline(self) -> str:
        """The first line."""
        if self.note:
            return f"runlora: {self.verdict}."
        return f"runlora: {self.verdict if self.sites else NOTHING_FOUND}"

    @property
    def summary(self) -> tuple[str, ...]:
        """What to do, what else was done, and when planning pays back: a sentence each."""
        if self.note:
            return ()
        said = [*advised(self.sites, self.recomputation)] if self.sites else []
        said += [stacked_text(self.stacked)] if self.stacked else []
        said += [upcast_text(self.upcast)] if self.upcast else []
        if self.sites:
            said.append(pay_back(self.planning_seconds, self.seconds, was_cached=self.from_cache))
        if self.from_cache:
            said.append("The compiled code came from a cache; this is the report stored with it.")
        if self.of_other_sizes:
            said.append("It was compiled for other sizes, and the numbers hold for those.")
        if self.planned_for:
            said.append(f"Planned for {self.planned_for}; nothing was measured on it.")
        if self.sites:
            said.append(total(self.graph, self.flops_before, self.flops_after))
        return tuple(filter(None, said))

    @property
    def steps_to_pay_back(self) -> int | None:
        """After how many steps planning pays back: measured time over predicted gain.

        None if the time was not measured or no gain is predicted.
        """
        return steps_to_pay_back(self.planning_seconds, self.seconds)


def combined(reports: Iterable[Report]) -> Report:
    """One report for several graphs; FLOPs are added."""
    parts = list(reports)
    is_empty = not any(part.sites or part.refusals for part in parts)
    return Report(
        graph=" + ".join(dict.fromkeys(part.graph for part in parts)) or "no",
        sites=tuple(site for part in parts for site in part.sites),
        refusals=tuple(refusal for part in parts for refusal in part.refusals),
        flops_before=sum(part.flops_before for part in parts),
        flops_after=sum(part.flops_after for part in parts),
        from_cache=bool(parts) and all(part.from_cache for part in parts),
        planned_for=", ".join(dict.fromkeys(p.planned_for for p in parts if p.planned_for)),
        stacked=tuple(count for part in parts for count in part.stacked),
        seconds=_added([part.seconds for part in parts]),
        recomputation=sum((part.recomputation for part in parts), NOTHING),
        planning_seconds=_sum([part.planning_seconds for part in parts]),
        note="; ".join(dict.fromkeys(p.note for p in parts if p.note)) if is_empty else "",
        rates=tuple(dict.fromkeys(rates for part in parts for rates in part.rates)),
        of_other_sizes=any(part.of_other_sizes for part in parts),
        upcast=sum(part.upcast for part in parts),
    )


def _added(times: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    """Times before and after, added; None if one is not known."""
    known = [time for time in times if time is not None]
    if not known or len(known) < len(times):
        return None
    return sum(before for before, _ in known), sum(after for _, after in known)


def _sum(times: Sequence[float | None]) -> float | None:
    """Times that were measured, added; None if one was not."""
    known = [time for time in times if time is not None]
    return sum(known) if known and len(known) == len(times) else None
