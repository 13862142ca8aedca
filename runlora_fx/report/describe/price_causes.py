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


def _saves_more(memory: str) -> Cause:
    """A cheaper order is not allowed to save what it saves."""
    return Cause(
        "memory",
        f"a cheaper order saves more for the backward, which runlora.memory={memory!r} does not "
        "allow",
        "set runlora.memory='fast' and a runlora.memory_budget if the memory suffices",
    )


@dataclass(frozen=True)
class LeftAlone:
    """A site that was left alone.

    Attributes:
        posed: Its problem.
        decision: What was decided.
        objective: How plans were ranked.
        memory: The option ``memory``.
        tokens: The dimensions that are the number of tokens; none if it has none.
        is_easy: True if searches at other sizes and under other options take little work.
        find_break_even: Computes the numbers of tokens for which merging pays.
    """

    posed: PosedProblem
    decision: Decision
    objective: Objective
    memory: str
    tokens: frozenset[int]
    is_easy: bool
    find_break_even: Callable[[], str]

    def causes(self) -> tuple[Cause, ...]:
        """Why no other order was taken, the more telling causes first."""
        if self.decision.changed or self.decision.settled_by == "failure":
            return (FAILED,)
        if self.decision.settled_by == "measurement":
            return (MEASURED,)
        if self._is_over_allowance():
            return (ALLOWANCE,)
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
            margin = f"runlora.margin ({self.objective.margin:.1%})"
            text = f"the cheapest order saves less than {margin}"
            return Cause("margin", text, "lower runlora.margin")
        return RANGE

    def _is_over_allowance(self) -> bool:
        """True if a plan that saves less was chosen, and then took too much time."""
        if self.memory != "low" or self.posed.is_symbolic:
            return False
        return decide(self.posed.problem, self.objective).changed

    def _found(self) -> Iterator[Cause]:
        """Why no order is cheaper, as far as comparisons tell."""
        problem = self.posed.problem
        unpriced = replace(self.objective, flops_per_saved_byte=0)
        if self.is_easy and holding_more(problem, unpriced):
            yield BUDGET_SPENT if self.memory == "fast" else _saves_more(self.memory)
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
        dims, rank = self.posed.problem.dims, self._rank
        if rank is None or dims[rank] < min(self._widths(rank), default=dims[rank] + 1):
            return None
        varying = Varying.of(self.posed.problem, frozenset([rank]), self.objective)
        known = PricedPlans(varying, (None, *self._plans))
        smaller = (1 << k for k in reversed(range((dims[rank] - 1).bit_length())))
        return next((size for size in smaller if known.choice(size)), None)

    @property
    def _rank(self) -> int | None:
        """The dimension between the two matrices that an input is multiplied by."""
        problem = self.posed.problem
        words = (
            word.without_diagonals
            for demand in problem.demands
            if not demand.backward
            for word in demand.core.words
        )
        return next((problem.extent(factors[1])[1] for factors in words if len(factors) == 3), None)

    def _widths(self, rank: int) -> list[int]:
        """The sizes of all dimensions but tokens and rank."""
        dims = enumerate(self.posed.problem.dims)
        return [size for d, size in dims if d not in self.tokens and d != rank and size > 1]
