"""The pipeline: the pass over a graph, and the report on it.

    rewrite_graph(graph, level, options)    changes the graph in place, returns the report

Invariant: the graph computes the same before and after, whatever fails. Without the option
``strict``, the part of the graph in which something fails stays as it came. Under ``strict`` the
error is raised, and the whole graph stays as it came.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import fx

from runlora_fx.cost_model.devices.elsewhere import machine_for
from runlora_fx.cost_model.devices.machine import Machine
from runlora_fx.cost_model.published import title_of
from runlora_fx.options import Options
from runlora_fx.passes.context import Context, Outcome
from runlora_fx.passes.emit.graph.transaction import Snapshot, note_failure
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.levels.sizes import forget_shapes
from runlora_fx.passes.planning import PlannedRegion, plan_linear_algebra
from runlora_fx.passes.reproducer import Reproducer, Run
from runlora_fx.report.data import Refusal, Report, Site
from runlora_fx.report.describe.base import Bases
from runlora_fx.report.describe.describe import Known, describe
from runlora_fx.report.describe.origin import unmatched
from runlora_fx.report.describe.price_causes import FAILED
from runlora_fx.report.figures.figures import Rates
from runlora_fx.report.figures.rates import rates_of

_log = logging.getLogger("runlora_fx")

#: Stands for the description of a region that could not be described.
_FAILED = object()


def rewrite_graph(
    graph: fx.Graph,
    level: Dialect,
    options: Options,
    machine: Machine | None = None,
    *,
    may_guard: bool = False,
    joins_in_place: bool = False,
    parameters: Sequence[int] = (),
) -> Report:
    """Rewrite a graph in place into its cheapest plan.

    Args:
        graph: Every tensor node has an example tensor in ``meta["val"]``.
        level: The level of the graph.
        options: What is asked of the pass.
        machine: What is known about the devices; what is stored about them, if None.
        may_guard: True if Dynamo compiles the graph. It checks guards on symbolic sizes before each
            call, and compiles again for a size outside of them.
        joins_in_place: True if what compiles the graph joins matrices without copies.
        parameters: Which of the graph's inputs are parameters, the same tensors in every call.

    Returns:
        What was seen and done.

    Raises:
        Exception: Under ``strict``, whatever fails; the graph is then as it came.
    """
    if machine is None:
        machine = machine_for(options.device, use_stored=options.tune != "off")
    run = Run(level, options, may_guard, joins_in_place, tuple(parameters))
    with collection_paused():
        try:
            # Its objects are freed when this returns, before the collector runs again.
            return _rewritten(graph, run, machine)
        finally:
            forget_shapes()


def _rewritten(graph: fx.Graph, run: Run, machine: Machine) -> Report:
    """Run the pass on a graph, and report on it."""
    came = Snapshot(graph)
    context = Context(
        *(graph, run.level, run.options, machine),
        *(run.may_guard, run.joins_in_place, run.parameters),
        reproduced=Reproducer(came.copied, run),
    )
    try:
        outcome: Outcome | None = None
        try:
            outcome = plan_linear_algebra(context, came)
        except Exception as error:
            if context.options.strict:
                raise
            came.restore()
            note_failure(context, ("this graph",), error)
        try:
            return _report(context, came.nodes, outcome)
        except Exception as error:
            _undescribed(context, error)
            return Report(graph=context.level.graph)
    except BaseException:
        came.restore()
        raise


@contextmanager
def collection_paused() -> Iterator[None]:
    """A context in which Python's garbage collector is off.

    A pass and a trace make many small objects and keep most of them to their end. Each collection
    would walk over the model's whole graph and find nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _report(context: Context, came: Sequence[fx.Node], outcome: Outcome | None) -> Report:
    """The report on what was done."""
    graph = "joint" if outcome is not None and outcome.is_joint else context.level.graph
    findings: Sequence[PlannedRegion] = () if outcome is None else outcome.findings
    failed = [
        Refusal(f"could not be rewritten ({type(f.error).__name__}: {f.error})", f.nodes, FAILED)
        for f in context.failures
    ]
    known: Known = {}
    bases = _bases(context, findings)
    described = [_described(context, finding, known, bases) for finding in findings]
    sites = tuple(site for site in described if isinstance(site, Site))
    missed: list[Refusal] = []
    if outcome is not None and _FAILED not in described:
        missed = _missed(context, came, sites)
    if missed and not sites and not failed:
        _log.warning(
            "runlora found no low-rank site, although the model has adapters (%s, ...): %s",
            missed[0].nodes[0],
            missed[0].reason,
        )
    flops = [_flops(finding) for finding in findings]
    outcome = outcome or Outcome()
    return Report(
        graph=graph,
        sites=sites,
        refusals=(*failed, *missed),
        flops_before=sum(before for before, _ in flops),
        flops_after=sum(after for _, after in flops),
        planned_for=title_of(context.options.device),
        seconds=outcome.seconds,
        stacked=outcome.stacked,
        recomputation=outcome.recomputation,
        rates=_rates(context, findings),
    )


def _rates(context: Context, findings: Sequence[PlannedRegion]) -> tuple[Rates, ...]:
    """The rates that plans were ranked by; none if FLOPs ranked them, or if reading them fails."""
    timed = (f for f in findings if f.objective.name == "time")
    try:
        return rates_of(context, {f.posed.problem.dtype: f.objective.profile for f in timed})
    except Exception as error:
        _undescribed(context, error)
        return ()


def _bases(context: Context, findings: Sequence[PlannedRegion]) -> Bases:
    """The base products that run as they came; none if finding them fails."""
    try:
        return Bases((f.region, f.posed) for f in findings if not f.changed)
    except Exception as error:
        _undescribed(context, error)
        return Bases(())


def _described(
    context: Context, finding: PlannedRegion, known: Known, bases: Bases
) -> Site | object | None:
    """A planned region as a site; None if it is no site, ``_FAILED`` if describing it failed."""
    try:
        region, posed, decision = finding.region, finding.posed, finding.decision
        base = bases.of(region, posed.problem) if posed.problem.has_products_of_products else None
        how = finding.changed, finding.objective, known, context.options.memory, base
        return describe(region, posed, decision, *how)
    except Exception as error:
        _undescribed(context, error)
        return _FAILED


def _missed(context: Context, came: Sequence[fx.Node], sites: Sequence[Site]) -> list[Refusal]:
    """A refusal for the adapters that no site covers."""
    try:
        return list(unmatched(came, sites))
    except Exception as error:
        _undescribed(context, error)
        return []


def _undescribed(context: Context, error: Exception) -> None:
    if context.options.strict:
        raise error
    _log.warning(
        "runlora could not describe a part of what it did; please report this%s "
        "(options={'runlora.strict': True} raises instead): %s: %s",
        context.reproduced(error),
        type(error).__name__,
        error,
    )


def _flops(finding: PlannedRegion) -> tuple[int, int]:
    """FLOPs before and after [FLOP]."""
    decision = finding.decision
    after = decision.after if finding.changed else decision.before
    return int(decision.before.flops), int(after.flops)
