"""The pipeline: the passes in order, each a transaction, and the report at the end.

    rewrite_graph(graph, level, options)    changes the graph in place, returns the report

Invariant: whatever fails, the graph computes what it did. Without the option ``strict`` a failure
costs the part of the graph that it is found in; under ``strict`` it is raised, and the graph is as
it came.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import fx

from runlora_fx.cost_model.devices.machine import Machine
from runlora_fx.options import Options
from runlora_fx.passes.context import Context, Outcome, Pass
from runlora_fx.passes.emit.transaction import attempt, transaction
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.planning import PlannedRegion, plan_linear_algebra
from runlora_fx.report.data import Refusal, Report, Site
from runlora_fx.report.describe import Known, describe
from runlora_fx.report.origin import unmatched

_log = logging.getLogger("runlora_fx")

#: In the order in which they run.
PASSES: tuple[Pass, ...] = (plan_linear_algebra,)

#: In the place of the description of a finding, where making it failed.
_FAILED = object()


def rewrite_graph(
    graph: fx.Graph,
    level: Dialect,
    options: Options,
    machine: Machine | None = None,
    *,
    may_guard: bool = False,
    parameters: Sequence[int] = (),
) -> Report:
    """Rewrite a graph in place into its cheapest plan.

    Args:
        graph: Every tensor node has an example tensor in ``meta["val"]``.
        level: The level of the graph.
        options: What is asked of the pass.
        machine: What is known about the devices; what is stored about them, if None.
        may_guard: Whether guards on symbolic sizes can be made: they are checked before each call,
            and another size gets another graph.
        parameters: Which of the graph's inputs are parameters, the same tensors in every call.

    Returns:
        What was seen and done.

    Raises:
        Exception: Under ``strict``, whatever fails; the graph is then as it came.
    """
    known = Machine(use_stored=options.tune != "off") if machine is None else machine
    with _collection_paused():
        # All that the passes made is gone once this returns: nothing is left to look through.
        return _rewritten(Context(graph, level, options, known, may_guard, tuple(parameters)))


def _rewritten(context: Context) -> Report:
    """Run the passes on the graph of a context, and report on them."""
    graph = context.graph
    came = list(graph.nodes)
    with transaction(graph):
        outcomes = []
        for run in PASSES:
            with attempt(context, "this graph"):
                outcomes.append(run(context))
        try:
            return _report(context, came, outcomes)
        except Exception as error:
            _undescribed(context, error)
            return Report(graph=context.level.graph)


@contextmanager
def _collection_paused() -> Iterator[None]:
    """A context in which Python looks for no cycles of garbage.

    A pass makes many small objects and keeps most of them to its end. Each search for garbage would
    walk over the model's whole graph, and find nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _report(context: Context, came: Sequence[fx.Node], outcomes: Sequence[Outcome]) -> Report:
    """The report on what was done; its failure costs nothing but the report."""
    is_joint = any(outcome.is_joint for outcome in outcomes)
    graph = "joint" if is_joint else context.level.graph
    findings = [finding for outcome in outcomes for finding in outcome.findings]
    failed = [
        Refusal(f"could not be rewritten ({type(f.error).__name__}: {f.error})", f.nodes)
        for f in context.failures
    ]
    known: Known = {}
    described = [_described(context, finding, known) for finding in findings]
    sites = tuple(site for site in described if isinstance(site, Site))
    missed: list[Refusal] = []
    if len(outcomes) == len(PASSES) and _FAILED not in described:
        missed = _missed(context, came, sites)
    if missed and not sites and not failed:
        _log.warning(
            "runlora found no low-rank site, although the model has adapters (%s, ...): %s",
            missed[0].nodes[0],
            missed[0].reason,
        )
    flops = [_flops(finding) for finding in findings]
    return Report(
        graph=graph,
        sites=sites,
        refusals=(*failed, *missed),
        flops_before=sum(before for before, _ in flops),
        flops_after=sum(after for _, after in flops),
    )


def _described(context: Context, finding: object, known: Known) -> Site | object | None:
    """What was found, as a site; what cannot be described is missing from the report."""
    try:
        return _site(finding, known)
    except Exception as error:
        _undescribed(context, error)
        return _FAILED


def _site(finding: object, known: Known) -> Site | None:
    match finding:
        case PlannedRegion(region, posed, decision, changed, objective):
            return describe(region, posed, decision, changed, objective, known)
    raise TypeError(f"a pass found {finding!r}, which no report describes")


def _missed(context: Context, came: Sequence[fx.Node], sites: Sequence[Site]) -> list[Refusal]:
    """The adapters that no site covers."""
    try:
        return list(unmatched(came, sites))
    except Exception as error:
        _undescribed(context, error)
        return []


def _undescribed(context: Context, error: Exception) -> None:
    if context.options.strict:
        raise error
    _log.warning(
        "runlora could not describe a part of what it did (please report this; "
        "options={'runlora.strict': True} raises instead): %s: %s",
        type(error).__name__,
        error,
    )


def _flops(finding: object) -> tuple[int, int]:
    """FLOPs before and after, of what no other finding counts [FLOP]."""
    match finding:
        case PlannedRegion(decision=decision, changed=changed):
            return int(decision.before.flops), int(
                (decision.after if changed else decision.before).flops
            )
    return 0, 0
