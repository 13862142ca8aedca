"""A report as JSON, for programs in any language.

    {"schema": 1, "verdict": "12 of 14 adapted layers rewritten: ...", "sites": [...], ...}

Invariant: within one schema number, names and their meaning do not change; names may be added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from runlora_fx.report.sites import Site

#: The version of the names and their meaning.
SCHEMA = 1

#: The fields of a site that are sympy expressions, and those that are functions.
EXPRESSIONS = ("flops_before_expr", "flops_after_expr")
_LEFT_OUT = ("find_break_even", "find_causes", "find_figures")


def as_json(verdict: str, report: Mapping[str, Any], indent: int | None = None) -> str:
    """A report as JSON.

    Args:
        verdict: Its verdict.
        report: Its fields by name.
        indent: The spaces of an indentation; all in one line if None.
    """
    whole = {
        **report,
        "seconds": _pair(report["seconds"]),
        "recomputation": asdict(report["recomputation"]),
        "sites": [_site(site) for site in report["sites"]],
        "refusals": [asdict(refusal) for refusal in report["refusals"]],
        "rates": [asdict(rates) for rates in report["rates"]],
    }
    return json.dumps({"schema": SCHEMA, "verdict": verdict, **whole}, indent=indent)


def _pair(times: Sequence[float] | None) -> dict[str, float] | None:
    """Predicted times by name [s]."""
    return None if times is None else dict(zip(("before", "after"), times, strict=True))


def _site(site: Site) -> dict[str, Any]:
    names = [field.name for field in fields(site) if field.name not in _LEFT_OUT]
    values = {name: getattr(site, name) for name in names}
    values |= {name: str(values[name]) for name in EXPRESSIONS}
    values["considered"] = [asdict(one) for one in site.considered]
    values["causes"] = [asdict(cause) for cause in site.causes]
    values |= {"seconds": _pair(site.seconds), "saved": _pair(site.saved)}
    return {**values, "break_even": site.break_even}
