"""Causes that prices show: why no other order of a site's products was taken.

    8 tokens; merging pays from 683 on   ->   Cause("tokens", ..., "merging pays when N > 682")

A plan is compared with the graph as it came, under the options that were given and under others. No
text is read: every cause follows from plans and their prices.

Invariant: causes are those of a site that was left alone, and there is at least one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from runlora_fx.cost_model.objective import Objective
from runlora_fx.passes.algebra.plan import Plan, incoming_operations
from runlora_fx.passes.algebra.posed import PosedProblem
from runlora_fx.passes.search.assigned import refusal
from runlora_fx.passes.search.decide import Decision, Priced, decide, holding_more, replaces
from runlora_fx.passes.search.ranges import merges_above
from runlora_fx.passes.search.varying import PricedPlans, Varying
from runlora_fx.report.sites import Cause

FAILED = Cause(
    "failure",
    "planning failed or the plan could not be written, and the log says why",
    "please report it; with runlora.strict=True the error is raised",
)
MEASURED = Cause("measured", "no other order was measured to be faster")
RANGE = Cause(
    "range",
    "another order is cheaper at this size, but not at every size that the compiled code serves",
    "compile with dynamic=False if the sizes are always the same",
)
ALLOWANCE = Cause(
    "memory",
    "an order that saves less for the backward takes more time than runlora.memory='low' may add",
)
SAVES_LESS = Cause(
    "memory",
    "a quicker order saves more for the backward, and runlora.memory='low' prefers to save less",
    "set runlora.memory='balanced' if the memory suffices",
)
SAVES_NO_MORE = Cause(
    "memory",
    "a cheaper order saves more for the backward, which runlora.memory='balanced' does not allow",
    "set runlora.memory='fast' and a runlora.memory_budget if the memory suffices",
)
BUDGET_SPENT = Cause(
    "memory",
    "a cheaper order saves more for the backward than what is left of runlora.memory_budget",
    "raise runlora.memory_budget if the memory suffices",
)
LIMIT = Cause(
    "limit", "the search was cut short before all orders were compared; none that it saw is cheaper"
)
TIE = Cause("tie", "another order costs the same, and a tie changes nothing")
NUMERICS = Cause(
    "numerics",
    "a cheaper order rounds once more, which runlora.numerics='strict' does not allow",
    "set runlora.numerics='default' if the training allows it",
)
SHAPE = Cause("shape", "at these sizes no other order costs less")


@dataclass(frozen=True)
class LeftAlone:
    """A site that was left alone.

    Attributes:
        posed: Its problem.
        decision: What was decided.
        objective: How plans were ranked.
        memory: The option ``memory``.
        tokens: The dimensions that are the number of tokens; none if it has none.
        rank: The dimension that is the rank; None if it has none.
        is_easy: True if searches at other sizes and under other options take little work.
        find_break_even: Computes the numbers of tokens for which merging pays.
    """

    posed: PosedProblem
    decision: Decision
    objective: Objective
    memory: str
    tokens: frozenset[int]
    rank: int | None
    is_easy: bool
    find_break_even: Callable[[], str]

    def causes(self) -> tuple[Cause, ...]:
        """Why no other order was taken, the more telling causes first."""
        if self.decision.changed or self.decision.settled_by == "failure":
            return (FAILED,)
        if self.decision.settled_by == "measurement":
            return (MEASURED,)
        if any(self.objective.is_less(other.price, self._came.price) for other in self._others):
            return (self._not_taken(),)
        found = tuple(self._found())
        return found or (SHAPE,)

    @cached_property
    def _plans(self) -> list[Plan]:
        """The plans that were compared and do not run the graph as it came."""
        came = set(self.posed.problem.incoming)
        plans = [alternative.plan for alternative in self.decision.alternatives]
        plans += [self.decision.plan] if self.decision.plan is not None else []
        return [plan for plan in plans if not plan.runs_as_in(came)]

    @cached_property
    def _came(self) -> Priced:
        return Priced.of(incoming_operations(self.posed.problem), self.objective)

    @cached_property
    def _others(self) -> list[Priced]:
        return [self._priced(plan, self.objective) for plan in self._plans]

    def _priced(self, plan: Plan, objective: Objective) -> Priced:
        return Priced.of(plan.operations(self.posed.problem), objective)

    def _not_taken(self) -> Cause:
        """Why a cheaper order was not taken."""
        if not any(replaces(self.objective, self._came, other) for other in self._others):
            margin = f"the cheapest order saves less than runlora.margin ({self._margin})"
            return Cause("margin", margin, "lower runlora.margin")
        return ALLOWANCE if self.memory == "low" and not self.posed.is_symbolic else RANGE

    @property
    def _margin(self) -> str:
        return f"{self.objective.margin:.1%}"

    def _found(self) -> Iterator[Cause]:
        """Why no order is cheaper, as far as comparisons tell."""
        problem = self.posed.problem
        if self._is_quicker_by_saving_more():
            yield SAVES_LESS
        elif self.is_easy and self.memory != "low" and holding_more(problem, self.objective):
            yield BUDGET_SPENT if self.memory == "fast" else SAVES_NO_MORE
        if self.decision.proof != "exact":
            yield LIMIT
        if self.is_easy and self.tokens and self._pays_with_more_tokens():
            said = self.find_break_even()
            if said:
                text = "there are too few tokens for merging the adapter to pay"
                yield Cause("tokens", text, f"merging pays {said}")
        refused = refusal(problem)
        if refused is not None:
            yield Cause("shape", refused, "use widths and a rank that are such multiples")
        if self.is_easy and not self.objective.adds_rounding:
            freer = replace(self.objective, adds_rounding=True)
            if decide(problem, freer).changed:
                yield NUMERICS
        if any(self._is_tie(other) for other in self._others):
            yield TIE
        rank = self._rank_that_pays()
        if rank is not None:
            text = (
                "the adapter's rank is as large as its layer, and at this rank no order is cheaper"
            )
            yield Cause("shape", text, f"with a rank of {rank} or less another order pays")

    def _is_quicker_by_saving_more(self) -> bool:
        """True if, without a price for what is saved, some order is cheaper."""
        if not self.objective.flops_per_saved_byte:
            return False
        free = replace(self.objective, flops_per_saved_byte=0)
        came = free.total(incoming_operations(self.posed.problem))
        return any(free.is_less(self._priced(plan, free).price, came) for plan in self._plans)

    def _pays_with_more_tokens(self) -> bool:
        """True if merging is the choice at some larger number of tokens."""
        varying = Varying.of(self.posed.problem, self.tokens, self.objective)
        return merges_above(varying, self.posed.problem.dims[min(self.tokens)])

    def _is_tie(self, other: Priced) -> bool:
        is_less = self.objective.is_less
        prices = other.price, self._came.price
        return not (is_less(*prices) or is_less(*reversed(prices)))

    def _rank_that_pays(self) -> int | None:
        """The largest power of two, below a rank as large as the layer, at which a plan pays."""
        dims = self.posed.problem.dims
        if self.rank is None or dims[self.rank] < min(self._widths, default=dims[self.rank] + 1):
            return None
        varying = Varying.of(self.posed.problem, frozenset([self.rank]), self.objective)
        known = PricedPlans(varying, (None, *self._plans))
        smaller = (1 << k for k in reversed(range((dims[self.rank] - 1).bit_length())))
        return next((size for size in smaller if known.choice(size)), None)

    @property
    def _widths(self) -> list[int]:
        """The sizes of all dimensions but tokens and rank."""
        dims = enumerate(self.posed.problem.dims)
        return [size for d, size in dims if d not in self.tokens and d != self.rank and size > 1]
