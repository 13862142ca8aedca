"""Reading back: a report from its JSON.

    report_from(json.loads(report.to_json()))    ->    an equal report

Expressions are read by a grammar of their own, which knows whole numbers, letters, ``*``, ``**``,
``+`` and ``-``. Nothing of a file is evaluated.

Invariant: what is not a report raises one of :data:`UNREADABLE`, and has no other effect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import sympy

from runlora_fx.passes.context import Recomputation
from runlora_fx.report.data import Report
from runlora_fx.report.figures.figures import Rates
from runlora_fx.report.sites import Candidate, Cause, Refusal, Site
from runlora_fx.report.stored.as_json import EXPRESSIONS, SCHEMA

#: The errors that reading a damaged or foreign report raises.
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RecursionError)

#: A factor of a term: a whole number or a letter, perhaps to a small power.
_FACTOR = re.compile(r"([0-9]{1,40}|[A-Za-z][A-Za-z0-9_]*)(?:\*\*([1-9]))?")

#: A term with its sign, and all of an expression.
_TERM = re.compile(r"\s*([+-]?)\s*([A-Za-z0-9_*]+)")

_COUNTS = ("tensors", "drawn", "packed", "fewer_bytes")


def report_from(data: Any) -> Report:
    """A report from what its JSON says. Names that this version does not know are left out.

    Args:
        data: The parsed JSON.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, RecursionError: If it is no report.
    """
    if data["schema"] != SCHEMA:
        raise ValueError(f"has the schema {data['schema']!r:.20}, not {SCHEMA}")
    again = data["recomputation"]
    return Report(
        graph=_text(data["graph"]),
        sites=tuple(map(_site, data["sites"])),
        refusals=tuple(map(_refusal, data["refusals"])),
        flops_before=_whole(data["flops_before"]),
        flops_after=_whole(data["flops_after"]),
        from_cache=data["from_cache"] is True,
        planned_for=_text(data["planned_for"]),
        stacked=tuple(map(_whole, data["stacked"])),
        seconds=_times(data["seconds"]),
        recomputation=Recomputation(*(_whole(again[name]) for name in _COUNTS)),
        planning_seconds=_time(data["planning_seconds"]),
        note=_text(data["note"]),
        rates=tuple(map(_rates, data["rates"])),
        of_other_sizes=data["of_other_sizes"] is True,
        upcast=_whole(data["upcast"]),
    )


def _rates(data: Mapping[str, Any]) -> Rates:
    names = _text(data["device"]), _text(data["dtype"])
    flops, bandwidth = _time(data["flops"]), _time(data["bandwidth"])
    if not flops or not bandwidth:
        raise ValueError("a rate is missing")
    return Rates(*names, flops, bandwidth, _text(data["source"]))


def _site(data: Mapping[str, Any]) -> Site:
    expressions = {name: expression(_text(data[name])) for name in EXPRESSIONS}
    saved = data["saved"]
    return Site(
        modules=tuple(map(_text, data["modules"])),
        shapes=_text(data["shapes"]),
        before=_text(data["before"]),
        after=_text(data["after"]),
        flops_before=_whole(data["flops_before"]),
        flops_after=_whole(data["flops_after"]),
        **expressions,
        changed=data["changed"] is True,
        reason=_text(data["reason"]),
        considered=tuple(
            Candidate(_text(one["form"]), _whole(one["flops"])) for one in data["considered"]
        ),
        is_exact=data["is_exact"] is True,
        find_break_even=partial(str, _text(data["break_even"])),
        find_causes=partial(tuple, [_cause(one) for one in data["causes"]]),
        base=_text(data["base"]),
        base_flops=_whole(data["base_flops"]),
        seconds=_times(data["seconds"]),
        saved=(_whole(saved["before"]), _whole(saved["after"])),
    )


def _refusal(data: Mapping[str, Any]) -> Refusal:
    cause = data["cause"]
    return Refusal(
        _text(data["reason"]),
        tuple(map(_text, data["nodes"])),
        None if cause is None else _cause(cause),
    )


def _cause(data: Mapping[str, Any]) -> Cause:
    return Cause(*(_text(data[name]) for name in ("name", "text", "remedy")))


def _text(x: Any) -> str:
    """A text without control characters, which a terminal would obey."""
    if not isinstance(x, str) or not x.replace("\n", "").isprintable():
        raise ValueError(f"{x!r:.40} is not a text")
    return x


def _whole(x: Any) -> int:
    if isinstance(x, bool) or not isinstance(x, int):
        raise ValueError(f"{x!r:.40} is not a whole number")
    return x


def _time(x: Any) -> float | None:
    """A time, or another amount that is not negative."""
    if x is None:
        return None
    if isinstance(x, bool) or not isinstance(x, int | float) or not 0 <= x < float("inf"):
        raise ValueError(f"{x!r:.40} is not a time")
    return float(x)


def _times(data: Mapping[str, Any] | None) -> tuple[float, float] | None:
    if data is None:
        return None
    before, after = (_time(data[name]) for name in ("before", "after"))
    if before is None or after is None:
        raise ValueError("a time is missing")
    return before, after


def expression(text: str) -> sympy.Expr:
    """A sum of products of letters; any other text becomes a symbol that is printed as the text."""
    terms = list(_TERM.finditer(text))
    if "".join(term.group() for term in terms) != text.rstrip():
        return sympy.Symbol(text)
    total = sympy.Integer(0)
    for term in terms:
        product = sympy.Integer(-1 if term[1] == "-" else 1)
        for part in re.split(r"(?<!\*)\*(?!\*)", term[2]):
            factor = _FACTOR.fullmatch(part)
            if factor is None:
                return sympy.Symbol(text)
            base = factor[1]
            value = (
                sympy.Integer(int(base))
                if base.isdecimal()
                else sympy.Symbol(base, positive=True, integer=True)
            )
            product *= value ** int(factor[2] or 1)
        total += product
    return total
