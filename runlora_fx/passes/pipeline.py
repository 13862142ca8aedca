"""The pass: read, search, emit, verify."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import fx

from runlora_fx.cost_model.devices.machine import Machine
from runlora_fx.options import Options
from runlora_fx.passes.emit.apply import NotAppliedError, apply
from runlora_fx.passes.experts.grouped import split_grouped_products
from runlora_fx.passes.experts.picked import split_gathered_weights
from runlora_fx.passes.experts.stacks import Mixture
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.lower.dots import gathered_dots
from runlora_fx.passes.lower.fused import Fused
from runlora_fx.passes.read.analysis import Analysis, device_of
from runlora_fx.passes.read.phases import recompute_dropout_masks
from runlora_fx.passes.read.reader import Casts
from runlora_fx.passes.search.decide import Decision
from runlora_fx.passes.search.dynamic import decide_all
from runlora_fx.passes.search.memory_budget import spend
from runlora_fx.passes.tune.pricing import Pricing, may_measure
from runlora_fx.passes.tune.trials import try_out
from runlora_fx.report.data import Refusal, Report
from runlora_fx.report.describe import describe, describe_mixture
from runlora_fx.report.origin import unmatched

#: What the policies take casts for.
_CASTS: dict[str, Casts] = {"strict": "kept", "default": "joined", "relaxed": "crossed"}

_log = logging.getLogger("runlora_fx")


def rewrite_graph(
    graph: fx.Graph,
    dialect: Dialect,
    options: Options,
    machine: Machine | None = None,
    *,
    may_guard: bool = False,
    parameters: Sequence[int] = (),
) -> Report:
    """Rewrite a graph in place into its cheapest plan.

    Args:
        graph: Every tensor node has an example tensor in ``meta["val"]``.
        dialect: The level of the graph.
        options: What is asked of the pass.
        machine: What is known about the devices; what is stored about them, if None.
        may_guard: Whether guards on symbolic sizes can be made: they are checked before each call,
            and another size gets another graph.
        parameters: Which of the graph's inputs are parameters, the same tensors in every call.

    Returns:
        What was seen and done.

    Raises:
        VerificationError: Under ``strict``, if an emitted region is not what it was to be.
        EmissionError: Under ``strict``, if a plan cannot be written into the graph.
    """
    known = Machine(use_stored=options.tune != "off") if machine is None else machine
    pricing = Pricing(options, known, device_of(graph))
    lasting = _lasting(graph, parameters) if options.reuse else []
    mixtures: list[Mixture] = []
    if options.numerics != "strict":
        mixtures = split_gathered_weights(graph)
        mixtures += split_grouped_products(graph, may_guard=may_guard)
    fused = Fused(graph)
    try:
        with gathered_dots(graph, dialect):
            report = _applied(graph, dialect, options, pricing, may_guard, lasting)
    finally:
        fused.undo()  # also where something else failed: the graph then runs as it came
    return _with_mixtures(report, mixtures)


def _applied(
    graph: fx.Graph,
    dialect: Dialect,
    options: Options,
    pricing: Pricing,
    may_guard: bool,
    lasting: Collection[fx.Node],
) -> Report:
    """Rewrite a graph; what cannot be written or proven is left as it came."""
    refused: dict[str, Refusal] = {}
    while True:
        try:
            return _attempt(graph, dialect, options, pricing, refused, may_guard, lasting)
        except NotAppliedError as failure:
            if options.strict:
                raise failure.cause from None
            name = failure.root.node.name
            _log.warning("runlora left %s as it came; please report this: %s", name, failure)
            refused[name] = Refusal(f"could not be rewritten ({failure})", (name,))


def _with_mixtures(report: Report, mixtures: Sequence[Mixture]) -> Report:
    """The report, with the mixtures of experts that were met before."""
    besides = [mixture.flops_besides for mixture in mixtures]
    return replace(
        report,
        sites=(*report.sites, *map(describe_mixture, mixtures)),
        flops_before=report.flops_before + sum(before for before, _ in besides),
        flops_after=report.flops_after + sum(after for _, after in besides),
    )


def _attempt(
    graph: fx.Graph,
    dialect: Dialect,
    options: Options,
    pricing: Pricing,
    refused: dict[str, Refusal],
    may_guard: bool,
    lasting: Collection[fx.Node],
) -> Report:
    analysis = Analysis(graph, dialect, casts=_CASTS[options.numerics])
    decisions = _decisions(analysis, options, pricing, may_guard, lasting)
    is_refused = [
        any(root.node.name in refused for root, _ in region.demands)
        for region in analysis.regions.regions
    ]
    plans = {
        i: decision.plan
        for i, decision in enumerate(decisions)
        if decision.changed and decision.plan is not None and not is_refused[i]
    }
    found = (
        describe(region, posed, decision, i in plans, pricing.objective(posed.problem.dtype))
        for i, (region, posed, decision) in enumerate(
            zip(analysis.regions.regions, analysis.posed, decisions, strict=True)
        )
    )
    sites = tuple(site for site in found if site is not None)
    missed = tuple(unmatched(graph, sites))
    if options.memory == "low" and analysis.phases.is_joint:
        recompute_dropout_masks(graph)
    apply(analysis, plans, [n for i in plans for n in analysis.nodes_of(i, decisions[i].lasting)])
    return Report(
        graph="joint" if analysis.phases.is_joint else dialect.graph,
        sites=sites,
        refusals=(*refused.values(), *missed),
        flops_before=sum(int(decision.before.flops) for decision in decisions),
        flops_after=sum(
            int((decision.after if i in plans else decision.before).flops)
            for i, decision in enumerate(decisions)
        ),
    )


def _lasting(graph: fx.Graph, parameters: Sequence[int]) -> list[fx.Node]:
    """The inputs that are parameters."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return [inputs[i] for i in parameters]


def _decisions(
    analysis: Analysis,
    options: Options,
    pricing: Pricing,
    may_guard: bool,
    lasting: Collection[fx.Node],
) -> list[Decision]:
    """What to do with each region of a graph."""
    posed = analysis.posed
    static = [None if p.is_symbolic else p.problem for p in posed]
    # Counting FLOPs needs no machine, and its plans are the same everywhere.
    is_timed = options.objective == "time" and options.tune in ("shapes", "plans")
    measures = is_timed and may_measure()
    if measures:
        pricing.measure(problem for problem in static if problem is not None)
    decisions = decide_all(
        posed, pricing.objective, analysis.hint, analysis.guard if may_guard else None
    )
    if options.memory_budget:
        objectives = [pricing.objective(p.problem.dtype) for p in posed]
        offered = [
            problem and replace(problem, lasting=analysis.leaves_of(i, lasting))
            for i, problem in enumerate(static)
        ]
        decisions = spend(offered, objectives, decisions, options.memory_budget)
    # Trials tell times only: where memory is to be saved, they would choose what holds more.
    if measures and options.tune == "plans" and options.memory == "balanced":
        decisions = try_out(analysis, pricing, decisions)
    return decisions
