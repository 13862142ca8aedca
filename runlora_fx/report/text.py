"""The report as text: the totals, a section for each kind of site, and what was left alone.

Example, for the key and value projections of three layers::

    Matrix products of the joint graph: 906.2 MFLOP -> 824.2 MFLOP (-9.0%)

    6 x model.layers.{0-2}.k_proj, model.layers.{0-2}.v_proj
      N=1024, i=384, o=128, r=32
      before: 302 MFLOP = 4*N*i*o + 6*N*i*r + 6*N*o*r
        Z = X A'
        Y = X W' + Z B'
        ...
      after: 274.7 MFLOP = 4*N*i*o + 4*N*i*r + 4*N*o*r + 4*i*o*r
        ...
      changed: 9.0% fewer FLOPs

Invariant: everything that was changed has a section. The text says nothing beyond the data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from textwrap import shorten

from runlora_fx.report.sites import Refusal, Site

#: The whole text where compiled code came from a cache.
FROM_CACHE = "runlora: compiled code came from a cache; it was planned when first compiled.\n"

#: What the letters of a plan stand for.
LEGEND = """\
X input, Y output, W weight, A and B adapter, b bias, g vector, s scaling, L other matrices;
M computed from weights alone, Z other intermediate results; dX gradient of X, X' X transposed.
N tokens, i inputs, o outputs, r rank, E experts, k the experts of the tokens.
"""

#: How many alternatives a section shows, and how many names a line.
_ALTERNATIVES, _NAMES = 4, 4

#: The longest text of an alternative [characters].
_WIDTH = 80


def lines(
    graph: str,
    sites: Sequence[Site],
    refusals: Sequence[Refusal],
    flops_before: int,
    flops_after: int,
) -> str:
    """The text of a report.

    Args:
        graph: The kind of graph.
        sites: What was found, in graph order.
        refusals: What was left alone although it looks like LoRA.
        flops_before: FLOPs of all matrix products that came [FLOP].
        flops_after: FLOPs of all matrix products that will run [FLOP].
    """
    kinds: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        kinds.setdefault((site.before, site.after, site.shapes, site.reason), []).append(site)
    parts = ["runlora: NO low-rank site found in this graph; it runs as it came.\n"]
    if sites:
        total = f"{_flop(flops_before)} -> {_flop(flops_after)}"
        change = _change(flops_before, flops_after)
        parts = [f"Matrix products of the {graph} graph: {total} ({change})\n"]
    parts += ["\n".join(_section(equal)) + "\n" for equal in kinds.values()]
    parts += [f"left alone: {r.reason}: {_names(r.nodes)}\n" for r in refusals]
    return "\n".join([*parts, LEGEND] if sites else parts)


def stacked_text(stacks: Sequence[int]) -> str:
    """A sentence about products that run as one.

    Args:
        stacks: By stack, how many products became one.
    """
    return (
        f"{sum(stacks)} products run as {len(stacks)}: those that became one read the same tensor "
        f"or are added up."
    )


def _section(sites: Sequence[Site]) -> Iterator[str]:
    """What was found and done at sites that are equal."""
    site = sites[0]
    yield f"{len(sites)} x {_names(name for equal in sites for name in equal.modules)}"
    yield f"  {site.shapes}"
    came = "before" if site.changed else "runs as it came"
    yield f"  {came}: {_flop(site.flops_before)} = {site.flops_before_expr}"
    yield from (f"    {line}" for line in site.before.splitlines())
    if site.changed:
        yield f"  after: {_flop(site.flops_after)} = {site.flops_after_expr}"
        yield from (f"    {line}" for line in site.after.splitlines())
    yield f"  {site.reason}"
    for cause in site.causes:
        yield f"  why: {cause.text}; {cause.remedy}"
    if site.break_even and not site.causes:
        yield f"  merging the adapter pays: {site.break_even}"
    if site.considered:
        yield "  considered, by first step:"
        for candidate in site.considered[:_ALTERNATIVES]:
            form = shorten(candidate.form, _WIDTH, placeholder=" ...")
            yield f"    {form}: {_flop(candidate.flops)}"


def _names(names: Iterable[str]) -> str:
    """Module names in one line, those of equal layers gathered.

    Example:
        ``layers.0.q, layers.1.q, layers.3.q`` becomes ``layers.{0-1,3}.q``.
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        head, number, tail = [*re.split(r"(\d+)", name, maxsplit=1), "", ""][:3]
        numbers.setdefault((head, tail), []).extend([int(number)] if number else [])
    found = [f"{head}{_runs(which)}{tail}" for (head, tail), which in numbers.items()]
    more = f" and {len(found) - _NAMES} more" if len(found) > _NAMES else ""
    return ", ".join(found[:_NAMES]) + more


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


def _flop(x: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(x) < 1000:
            return f"{x:.4g} {unit}FLOP"
        x /= 1000
    return f"{x:.4g} PFLOP"


def _change(before: int, after: int) -> str:
    return f"{(after - before) / before:+.1%}" if before else "nothing to do"
