"""Trials: compile the best few plans of a region with what surrounds them, and time them.

Example: a graph computes a LoRA layer and a GELU for 256 tokens, base and adapter separately. The
plan that merges the weights is tried as well::

    changed: 12.4% less time measured (810 us -> 710 us)

Invariant: a stored time is used only for the same problem in the same region graph, with the same
settings of the compiler, on a device of the same model with the same settings. If a trial fails,
the predicted decision stays.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import fx

from runlora_fx._torch_caches import compiler_settings
from runlora_fx._torch_compat import compile_graph, partitioned
from runlora_fx.cost_model.devices.measure import random_tensor, seconds, undisturbed
from runlora_fx.cost_model.objective import Objective, saves
from runlora_fx.cost_model.store import Record
from runlora_fx.passes.algebra.plan import Plan
from runlora_fx.passes.algebra.posed import PosedProblem
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.emit.apply import NotAppliedError, apply
from runlora_fx.passes.levels.sizes import example_of
from runlora_fx.passes.read.analysis import Analysis
from runlora_fx.passes.search.decide import Decision, alternatives, judge
from runlora_fx.passes.tune.pricing import Pricing
from runlora_fx.passes.tune.region_graph import RegionGraph, region_graph
from runlora_fx.passes.upcast import Profiles, upcast

_log = logging.getLogger("runlora_fx")

#: The largest number of plans that are tried for a region, with the incoming graph.
_MAX_PLANS = 4

#: The number of rounds in which all plans of a region are timed. The least time of each is used,
#: because other work on the machine only makes a measurement longer.
_ROUNDS = 3

#: The share of time that a plan must save. A smaller one could be noise.
_NOISE = 0.01

_AS_IT_CAME = "as it came"


def try_out(analysis: Analysis, pricing: Pricing, decisions: Sequence[Decision]) -> list[Decision]:
    """The decisions after trials.

    Equal regions are tried once, and stored times are not measured again. A region with symbolic
    sizes, or one that cannot be compiled, keeps its decision.
    """
    settled: dict[tuple[Problem, str], Decision] = {}
    decided = list(decisions)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("runlora tries plans", total=len(decided))
        for i, decision in enumerate(decisions):
            problem = analysis.posed[i].problem
            objective = pricing.objective(problem.dtype)
            plans = _candidates(problem, objective, decision)
            if len(plans) > 1 and _is_timed(analysis.posed[i]):
                tried = region_graph(
                    analysis.graph, analysis.reader, analysis.phases, analysis.regions.regions[i]
                )
                key = (problem, tried.signature)
                if key not in settled:
                    settled[key] = _tried(analysis, pricing, decision, problem, plans, tried)
                decided[i] = settled[key]
            progress.advance(task)
    return decided


def _is_timed(posed: PosedProblem) -> bool:
    """True if a region can be timed: its sizes are numbers, and random inputs are valid.

    Offsets of grouped products must ascend, and the time depends on them.
    """
    kinds = {assignment.kind for assignment in posed.problem.assignments}
    return not posed.is_symbolic and "grouped" not in kinds


def _candidates(
    problem: Problem, objective: Objective, decision: Decision
) -> dict[str, Plan | None]:
    """By digest, the best few plans; None stands for the incoming graph."""
    if decision.plan is None:
        return {}
    others = sorted(
        (a.plan for a in alternatives(problem, objective)),
        key=lambda plan: objective.total(plan.operations(problem)),
    )
    found: dict[str, Plan | None] = {_AS_IT_CAME: None}
    came = set(problem.incoming)
    for plan in (decision.plan, *others):
        if len(found) < _MAX_PLANS and not plan.runs_as_in(came):
            found.setdefault(_digest(sorted(map(repr, plan.signature))), plan)
    return found


def _tried(
    analysis: Analysis,
    pricing: Pricing,
    decision: Decision,
    problem: Problem,
    plans: dict[str, Plan | None],
    tried: RegionGraph,
) -> Decision:
    """The decision for the plan that was measured to be the fastest."""
    # The order of sets differs between processes.
    key = _digest(
        [
            replace(problem, kept=frozenset()),
            sorted(map(repr, problem.kept)),
            *(tried.signature, pricing.settings, compiler_settings()),
        ]
    )
    times = {
        k: t for k, t in pricing.record(problem.dtype).plans.get(key, {}).items() if k in plans
    }
    if times.keys() != plans.keys():
        try:
            times = _times(analysis, problem, plans, tried, pricing)
        except Exception as error:  # a trial that fails must not break the compilation
            _log.info("runlora could not try the plans of a region: %r", error)
            return decision
        pricing.add(problem.dtype, Record(plans={key: times}))
    fastest = min(times, key=lambda name: times[name])
    before, after = times[_AS_IT_CAME], times[fastest]
    saved = 1 - after / before
    measured = f"{before * 1e6:.4g} us -> {after * 1e6:.4g} us"
    plan = plans[fastest]
    objective = pricing.objective(problem.dtype)
    if plan is None or not saves(before, after, max(_NOISE, objective.margin)):
        reason = f"left alone: no plan was measured to be faster ({measured})"
        return replace(
            decision,
            changed=False,
            after=decision.before,
            reason=reason,
            settled_by="measurement",
        )
    judged = judge(problem, objective, plan, decision.alternatives)
    reason = f"changed: {saved:.1%} less time measured ({measured})"
    after_cost = plan.cost(problem)
    return replace(judged, changed=True, after=after_cost, reason=reason, settled_by="measurement")


def _times(
    analysis: Analysis,
    problem: Problem,
    plans: dict[str, Plan | None],
    tried: RegionGraph,
    pricing: Pricing,
) -> dict[str, float]:
    """The time of each plan, forward and backward [s].

    Raises:
        Exception: If the region graph does not pose the problem, or something cannot be compiled
            or run.
    """
    graphs = {name: _planned(analysis, problem, plan, tried) for name, plan in plans.items()}

    def measure() -> dict[str, float]:
        with undisturbed(pricing.device):
            runs = {
                name: _compiled(graph, tried, pricing.profiles) for name, graph in graphs.items()
            }
            rounds = [
                {
                    name: sum(seconds(run, pricing.device, repeats=1) for run in run_all)
                    for name, run_all in runs.items()
                }
                for _ in range(_ROUNDS)
            ]
        return {name: min(times[name] for times in rounds) for name in runs}

    # A thread of its own, because the outer compilation has thread-local state. The context is
    # copied, because from torch 2.13 on context variables have the settings of Inductor.
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(copy_context().run, measure).result()


def _planned(
    analysis: Analysis, problem: Problem, plan: Plan | None, tried: RegionGraph
) -> fx.GraphModule:
    """A copy of a region graph that computes the region by a plan."""
    copied = fx.Graph()
    output = copied.graph_copy(tried.module.graph, {})
    copied.output(output)
    module = fx.GraphModule(tried.module, copied)
    if plan is not None:
        own = Analysis(copied, analysis.dialect, casts=analysis.reader.casts)
        index = next(i for i, posed in enumerate(own.posed) if posed.problem == problem)
        try:
            apply(own, {index: plan})
        except NotAppliedError as failure:
            raise failure.cause from None
    module.recompile()
    return module


def _compiled(
    module: fx.GraphModule, tried: RegionGraph, profiles: Profiles
) -> list[Callable[[], object]]:
    """Functions that run the forward and the backward, if there is one, on random data."""
    known = {n.name: _random(n) for n in module.graph.nodes if n.op == "placeholder"}
    parts: tuple[fx.GraphModule, ...] = (module,)
    if tried.is_joint:
        parts = partitioned(module, list(known.values()), tried.forward_outputs)
    calls: list[Callable[[], object]] = []
    for part in parts:
        given = [known[node.name] for node in part.graph.nodes if node.op == "placeholder"]
        upcast(part.graph, profiles)
        compiled = compile_graph(part, given)
        results = compiled(*given)
        (output,) = (node for node in part.graph.nodes if node.op == "output")
        known |= {
            node.name: value
            for node, value in zip(output.args[0], results, strict=True)
            if isinstance(node, fx.Node)
        }
        calls.append(partial(compiled, *given))
    return calls


def _random(node: fx.Node) -> Any:
    """Random data with the dtype, shape and strides of a node; expanded tensors stay expanded."""
    val = example_of(node)
    if val is None:
        return node.meta.get("val")
    spans = ((size - 1) * stride for size, stride in zip(val.shape, val.stride(), strict=True))
    memory = random_tensor(1 + sum(spans), dtype=torch.float32, device=val.device)
    data = memory.to(val.dtype) if val.dtype.is_floating_point else (memory > 0).to(val.dtype)
    return data.as_strided(val.shape, val.stride())


def _digest(of: object) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()[:24]
