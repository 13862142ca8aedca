"""A report as JSON, for programs in any language.

    {"schema": 1, "verdict": "12 of 14 adapted layers rewritten: ...", "sites": [...], ...}

Invariant: within one schema number, names and their meaning do not change; names may be added.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from runlora_fx.report.sites import Site

if TYPE_CHECKING:
    from runlora_fx.report.data import Report

#: The version of the names and their meaning.
SCHEMA = 1

#: The fields of a site that are sympy expressions, and one that is a function.
_EXPRESSIONS, _FUNCTION = ("flops_before_expr", "flops_after_expr"), "find_break_even"


def as_json(report: Report, indent: int | None = None) -> str:
    """A report as JSON.

    Args:
        report: The report.
        indent: The spaces of an indentation; all in one line if None.
    """
    whole: dict[str, Any] = {
        "schema": SCHEMA,
        "verdict": report.verdict,
        "graph": report.graph,
        "from_cache": report.from_cache,
        "planned_for": report.planned_for,
        "flops_before": report.flops_before,
        "flops_after": report.flops_after,
        "seconds": _pair(report.seconds),
        "stacked": report.stacked,
        "recomputation": asdict(report.recomputation),
        "sites": [_site(site) for site in report.sites],
        "refusals": [asdict(refusal) for refusal in report.refusals],
    }
    return json.dumps(whole, indent=indent)


def _pair(times: Sequence[float] | None) -> dict[str, float] | None:
    """Predicted times by name [s]."""
    return None if times is None else dict(zip(("before", "after"), times, strict=True))


def _site(site: Site) -> dict[str, Any]:
    names = [field.name for field in fields(site) if field.name != _FUNCTION]
    values = {name: getattr(site, name) for name in names}
    values |= {name: str(values[name]) for name in _EXPRESSIONS}
    values |= {name: [asdict(one) for one in values[name]] for name in ("causes", "considered")}
    return {**values, "break_even": site.break_even}
