"""Logs: what torch's logs, traces and debug folder show of each graph.

    TORCH_LOGS="runlora_fx"              the verdict on each graph
    TORCH_LOGS="+runlora_fx"             and the report
    TORCH_LOGS="runlora_fx,runlora_graph"   and the graph before and after
    TORCH_TRACE=/folder                  all of it in the structured trace, for ``tlparse``
    TORCH_COMPILE_DEBUG=1                all of it as files beside those of Inductor

Invariant: showing what was done changes nothing and never fails a compilation. Without one of these
settings it costs the same for every graph, whatever its size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import fx

from runlora_fx._torch_debug import (
    GRAPH_LOG,
    LOGGER,
    PLAN_LOG,
    debug_folder,
    is_graph_wanted,
    is_traced,
    source_of,
    trace,
)
from runlora_fx.passes.emit.nodes.inserter import RULE
from runlora_fx.report.data import Report

_log = logging.getLogger(LOGGER)

_NO_ADAPTER = "it has no adapter (none was added to the model, or merge_and_unload() merged it)"


def before(graph: fx.Graph) -> str:
    """The code of a graph that is about to be rewritten; empty if nobody asked to see graphs."""
    try:
        return source_of(graph) if is_graph_wanted() else ""
    except Exception as error:
        _not_shown(error)
        return ""


def show(report: Report, came: str, graph: fx.Graph) -> None:
    """Show what was done with a graph wherever someone asked to see it.

    Args:
        report: The report on the graph.
        came: What :func:`before` returned.
        graph: The graph as it is now.
    """
    try:
        _show(report, came, graph)
    except Exception as error:
        _not_shown(error)


def _show(report: Report, came: str, graph: fx.Graph) -> None:
    if _log.isEnabledFor(logging.INFO):
        _log.info("%s", _decision(report))
    if PLAN_LOG.isEnabledFor(logging.DEBUG):
        PLAN_LOG.debug("%s", str(report).rstrip())
    if not came:
        return
    made = source_of(graph, RULE)
    if GRAPH_LOG.isEnabledFor(logging.DEBUG):
        GRAPH_LOG.debug("before the rewrite:\n%s", came)
        GRAPH_LOG.debug("after the rewrite:\n%s", made)
    parts: dict[str, Callable[[], str]] = {
        "report.txt": lambda: str(report),
        "report.json": lambda: report.to_json(indent=1),
        "graph_before.py": lambda: came,
        "graph_after.py": lambda: made,
    }
    if is_traced():
        for name, content in parts.items():
            encoding = "json" if name.endswith(".json") else "string"
            trace(f"runlora_{name.replace('.', '_')}", encoding, content)
    folder = debug_folder()
    if folder is not None:
        for name, content in parts.items():
            (folder / name).write_text(content(), encoding="utf-8")
        _log.warning("runlora debug files: %s", folder)


def _decision(report: Report) -> str:
    """What was decided about a graph, in one line."""
    if report.sites:
        return f"runlora: {report.verdict} ({report.graph} graph)"
    reasons = [f"{refusal.reason}: {', '.join(refusal.nodes[:2])}" for refusal in report.refusals]
    why = "; ".join(reasons) or _NO_ADAPTER
    return f"runlora leaves this {report.graph} graph as it came: {why}"


def _not_shown(error: Exception) -> None:
    _log.info("runlora could not show what it did: %s: %s", type(error).__name__, error)
