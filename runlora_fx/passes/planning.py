"""Planning: the pass that reads the linear algebra of a graph, plans it, and writes the plans.

    x W' + 2 (x A') B'      ->      x (W + 2 B A)'      where that costs less

A failure leaves one region as it came, and no other. If writing plans fails and the region is not
known, the regions are split in halves, each half is written in a transaction of its own, and so on.

Invariant: a region is either written and proven, or runs as it came.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import fx

from runlora_fx._torch_compat import repeats_random_operators
from runlora_fx.cost_model.objective import Objective
from runlora_fx.passes.algebra.plan import Plan, incoming_cost
from runlora_fx.passes.algebra.posed import PosedProblem
from runlora_fx.passes.context import NOTHING, Context, Outcome
from runlora_fx.passes.emit.apply import NotAppliedError, apply
from runlora_fx.passes.emit.graph.recompute import keep_before_overwriting
from runlora_fx.passes.emit.graph.transaction import Snapshot, note_failure, transaction
from runlora_fx.passes.levels.sizes import forget_shapes
from runlora_fx.passes.read.analysis import Analysis
from runlora_fx.passes.read.regions import Region
from runlora_fx.passes.recompute.activations import recompute_activations
from runlora_fx.passes.recompute.random_numbers import save_random_numbers
from runlora_fx.passes.search.allowance import within_allowance
from runlora_fx.passes.search.decide import Decision, price_of
from runlora_fx.passes.search.dynamic import decide_all
from runlora_fx.passes.search.memory_budget import spend
from runlora_fx.passes.stack.find import Finder
from runlora_fx.passes.stack.products import Products
from runlora_fx.passes.stack.write import StackWriter
from runlora_fx.passes.tune.pricing import Pricing, may_measure
from runlora_fx.passes.tune.trials import try_out

_log = logging.getLogger("runlora_fx")

_T = TypeVar("_T")


@dataclass(frozen=True)
class PlannedRegion:
    """A region of the incoming graph, and what was done with it.

    Attributes:
        region: The region.
        posed: Its problem.
        decision: What was decided.
        changed: True if the plan was written.
        objective: How plans were ranked.
    """

    region: Region
    posed: PosedProblem
    decision: Decision
    changed: bool
    objective: Objective


def plan_linear_algebra(context: Context, came: Snapshot | None = None) -> Outcome:
    """Rewrite the linear algebra of a graph into its cheapest plans.

    Args:
        context: The graph.
        came: A snapshot of the graph as it is now, if there is one already.
    """
    return _Planner(context, came).run()


class _Planner:
    """Plans the regions of one graph."""

    def __init__(self, context: Context, came: Snapshot | None) -> None:
        self._context = context
        self._came = came
        self._options = context.options
        self._pricing = Pricing(context.options, context.machine, context.device)
        self._changed: set[str] = set()
        self._seconds_stacked = 0.0

    def run(self) -> Outcome:
        """Read the graph, decide about its regions, and write the chosen plans."""
        analysis, decisions = self._decided()
        names = [_name(region) for region in analysis.regions.regions]
        chosen = [n for n, one in zip(names, decisions, strict=True) if _chosen(one) is not None]
        if chosen:
            self._write(analysis, decisions, chosen)
        stacked: tuple[int, ...] = ()
        if (
            analysis.phases.is_joint
            and self._context.joins_in_place
            and self._options.objective == "time"
        ):
            stacked = self._or_else(
                lambda: self._stack(analysis, decisions), stacked, "stack products"
            )
        if analysis.phases.is_joint and repeats_random_operators():
            save_random_numbers(self._context)
        if (
            analysis.phases.is_joint
            and analysis.effects.writes_inputs
            and (self._changed or self._options.memory == "low")
        ):
            keep_before_overwriting(self._context.graph, self._context.effects())
        recomputation, seconds = NOTHING, self._seconds(analysis, decisions, names)
        if decisions and analysis.phases.is_joint and self._options.memory != "fast":
            objective = self._main_objective(analysis, decisions)
            recomputation = self._or_else(
                lambda: recompute_activations(self._context, objective, seconds),
                recomputation,
                "recompute activations",
            )
        found = (
            PlannedRegion(region, posed, decision, name in self._changed, self._objective(posed))
            for region, posed, decision, name in zip(
                analysis.regions.regions, analysis.posed, decisions, names, strict=True
            )
        )
        return Outcome(tuple(found), analysis.phases.is_joint, stacked, recomputation, seconds)

    def _decided(self) -> tuple[Analysis, list[Decision]]:
        """The graph as it came, and what to do with each region."""
        analysis = self._context.read()
        self._check_reading(analysis)
        decisions = self._decisions(analysis)
        sizes = {size for posed in analysis.posed for size in posed.dims}
        if all(map(self._context.is_current, sizes)):
            return analysis, decisions
        # A range that holds a single size fixes its symbol: the graph now has a number there.
        forget_shapes()
        analysis = self._context.read()
        return analysis, self._decisions(analysis)

    def _check_reading(self, analysis: Analysis) -> None:
        for region, error in analysis.failures:
            if self._options.strict or not analysis.posed:
                raise error
            self._note(_name(region), error)

    def _objective(self, posed: PosedProblem) -> Objective:
        return self._pricing.objective(posed.problem.dtype)

    def _note(self, name: str, error: Exception) -> None:
        if self._options.strict:
            raise error
        note_failure(self._context, (name,), error)

    # -- deciding ------------------------------------------------------------------------------

    def _decisions(self, analysis: Analysis) -> list[Decision]:
        """What to do with each region of a graph."""
        posed, pricing = analysis.posed, self._pricing
        static = [None if p.is_symbolic else p.problem for p in posed]
        # Counting FLOPs needs no machine, and its plans are the same everywhere.
        is_by_time = self._options.objective == "time"
        is_timed = is_by_time and self._options.tune in ("shapes", "plans")
        measures = is_timed and may_measure()
        if measures:
            wanted = [problem for problem in static if problem is not None]
            self._or_else(lambda: pricing.measure(wanted), None, "measure products")
        decisions = self._planned(analysis)
        if self._options.memory == "low" and is_by_time and None not in static:
            objectives = [self._objective(p) for p in posed]
            problems, offered_low = [p.problem for p in posed], decisions
            decisions = self._or_else(
                lambda: within_allowance(problems, objectives, offered_low),
                offered_low,
                "limit the time that less memory takes",
            )
        if self._options.memory_budget:
            objectives = [self._objective(p) for p in posed]
            offered = [
                problem and replace(problem, lasting=analysis.leaves_of(i, self._context.lasting))
                for i, problem in enumerate(static)
            ]
            budget, settled = self._options.memory_budget, decisions
            decisions = self._or_else(
                lambda: spend(offered, objectives, settled, budget), settled, "spend the budget"
            )
        # Trials compare times alone. They would undo choices that save memory.
        if measures and self._options.tune == "plans" and self._options.memory == "balanced":
            tried = decisions
            decisions = self._or_else(lambda: try_out(analysis, pricing, tried), tried, "try plans")
        return decisions

    def _or_else(self, do: Callable[[], _T], otherwise: _T, what: str) -> _T:
        """The result of an optional step; ``otherwise`` if it fails, unless ``strict`` is set."""
        try:
            return do()
        except Exception as error:
            if self._options.strict:
                raise
            _log.warning(
                "runlora could not %s; please report this%s: %s: %s",
                what,
                self._context.reproduced(error),
                type(error).__name__,
                error,
            )
            return otherwise

    def _planned(self, analysis: Analysis) -> list[Decision]:
        """The cheapest plan of each region; a region whose search fails is left alone."""
        try:
            return self._decide(analysis.posed)
        except Exception:
            if self._options.strict or len(analysis.posed) < 2:
                raise
        decisions: list[Decision] = []
        for region, posed in zip(analysis.regions.regions, analysis.posed, strict=True):
            try:
                decisions += self._decide([posed])
            except Exception as error:  # one region's failure costs that region only
                self._note(_name(region), error)
                cost = incoming_cost(posed.problem)
                reason = "left alone: planning failed"
                decisions.append(Decision(None, False, cost, cost, reason, settled_by="failure"))
        return decisions

    def _decide(self, posed: Sequence[PosedProblem]) -> list[Decision]:
        guard = self._context.guard if self._context.may_guard else None
        return decide_all(posed, self._pricing.objective, self._context.hint, guard)

    # -- writing -------------------------------------------------------------------------------

    def _write(self, analysis: Analysis, decisions: list[Decision], chosen: list[str]) -> None:
        """Write plans. A failure leaves the region that causes it as it came.

        Args:
            analysis: The graph as it came.
            decisions: What was decided about its regions.
            chosen: The names of the regions to change.
        """
        pending = [chosen]
        is_fresh = True
        last: Exception = LookupError("the regions are others than before")
        while pending:
            names = pending.pop()
            if not is_fresh:  # earlier transactions may have changed the graph
                analysis = self._context.read()
                decisions = self._planned(analysis)
            is_fresh = False
            indices = {_name(region): i for i, region in enumerate(analysis.regions.regions)}
            here = {name: indices[name] for name in names if name in indices}
            lost = [name for name in names if name not in indices]
            if lost:  # they share a root with a region that was written, and are other regions now
                note_failure(self._context, lost, last)
            found = {i: _chosen(decisions[i]) for i in here.values()}
            plans = {i: plan for i, plan in found.items() if plan is not None}
            try:
                as_it_came, self._came = self._came, None
                with transaction(self._context.graph, as_it_came):
                    apply(analysis, plans, probes=self._options.strict)
                self._changed |= {name for name, i in here.items() if i in plans}
            except NotAppliedError as failure:
                mine = _of_root(analysis, here, failure.root.node)
                self._note(failure.root.node.name, failure.cause)
                rest = [name for name in names if name not in mine]
                pending += [rest] if rest and mine else []
            except Exception as error:
                if self._options.strict:
                    raise
                last = error
                if len(names) == 1:
                    self._note(names[0], error)
                else:
                    middle = len(names) // 2
                    pending += [names[middle:], names[:middle]]

    # -- stacks --------------------------------------------------------------------------------

    def _stack(self, analysis: Analysis, decisions: Sequence[Decision]) -> tuple[int, ...]:
        """Have products that read the same tensor run as one where that takes less time.

        Returns:
            By stack, how many products became one.
        """
        problems = [posed.problem for posed in analysis.posed]
        if not (self._changed or any(p.has_products_of_products for p in problems)):
            return ()
        products = Products(self._context)
        price = self._main_objective(analysis, decisions).profile.of
        stacks = Finder(products, price).found()
        if stacks:
            with transaction(self._context.graph):
                StackWriter(self._context, products).write(stacks)
            self._seconds_stacked = sum(stack.saved for stack in stacks)
        return tuple(len(stack.products) for stack in stacks)

    def _main_objective(self, analysis: Analysis, decisions: Sequence[Decision]) -> Objective:
        """How plans of the region of the most FLOPs are ranked."""
        largest = max(range(len(decisions)), key=lambda i: decisions[i].before.flops)
        return self._objective(analysis.posed[largest])

    # -- memory --------------------------------------------------------------------------------

    def _seconds(
        self, analysis: Analysis, decisions: Sequence[Decision], names: Sequence[str]
    ) -> tuple[float, float] | None:
        """The predicted time of all products, before and after [s]; None if FLOPs rank plans."""
        if self._options.objective != "time":
            return None
        known: dict[int, tuple[float, float]] = {}  # equal problems have one decision
        before, after = 0.0, -self._seconds_stacked
        for name, posed, decision in zip(names, analysis.posed, decisions, strict=True):
            if id(decision) not in known:
                # Bytes that are saved have a price under "low". They take no time.
                objective = replace(self._objective(posed), flops_per_saved_byte=0)
                ways = (replace(decision, changed=False), decision)
                came, runs = (float(price_of(way, posed.problem, objective)) for way in ways)
                known[id(decision)] = came, runs
            came, runs = known[id(decision)]
            before += came
            after += runs if name in self._changed else came
        return before, after


def _of_root(analysis: Analysis, here: dict[str, int], root: fx.Node) -> set[str]:
    """The names of the regions that have a part of a root."""
    return {
        name
        for name, i in here.items()
        if any(other.node is root for other, _ in analysis.regions.regions[i].demands)
    }


def _chosen(decision: Decision) -> Plan | None:
    """The plan to write; None if the region is left alone."""
    return decision.plan if decision.changed else None


def _name(region: Region) -> str:
    """The name of a region: those of its roots."""
    return ", ".join(dict.fromkeys(root.node.name for root, _ in region.demands))
