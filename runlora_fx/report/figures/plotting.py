"""Plotting: what a site is plotted from: expressions in its dimensions.

    Y = X W' + Z B'    ->    Curve("before", 2*N*i*o + 2*N*i*r + 2*N*o*r)

Invariant: a curve says what one plan takes at other numbers of tokens. Which plan is chosen there
is another question.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from textwrap import shorten

import sympy

from runlora_fx.cost_model.objective import Objective
from runlora_fx.cost_model.ops import Operation
from runlora_fx.passes.algebra.plan import Plan, incoming_operations
from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar
from runlora_fx.passes.algebra.posed import PosedProblem
from runlora_fx.passes.algebra.problem import Dims
from runlora_fx.passes.search.decide import Decision
from runlora_fx.report.describe.notation import Names, first_step
from runlora_fx.report.figures.drawing import MOST_STEPS, drawn
from runlora_fx.report.figures.figures import Curve, Figures

_log = logging.getLogger("runlora_fx")

#: The longest name of a curve [characters].
_WIDTH = 48


def figures_of(
    posed: PosedProblem,
    names: Names,
    scalars: Mapping[Polynomial, Scalar],
    decision: Decision,
    changed: bool,
    objective: Objective,
) -> Figures | None:
    """What the drawings and plots of a site are made of; None if making it fails.

    Args:
        posed: The problem of the region.
        names: The names of its leaves and dimensions.
        scalars: By demand, its scalar in the graph.
        decision: Its decision.
        changed: True if the plan was emitted.
        objective: The objective that ranked plans.
    """
    problem = posed.problem
    try:
        came = Plan(dict(reversed(problem.incoming)))  # the first step of a value counts
        plan = decision.plan if changed else None
        sizes = zip(names.symbols, problem.dims, strict=True)
        return Figures(
            dtype=problem.dtype,
            sizes=tuple({str(s): size for s, size in sizes if s.is_Symbol}.items()),
            before=drawn(problem, names, scalars, came, objective),
            after=None if plan is None else drawn(problem, names, scalars, plan, objective),
            is_timed=objective.name == "time",
            curves=tuple(_curves(posed, names, decision, changed, objective)),
        )
    except Exception:  # the rest of the report is made all the same
        _log.warning("runlora could not draw a plan (please report this)", exc_info=True)
        return None


def _curves(
    posed: PosedProblem, names: Names, decision: Decision, changed: bool, objective: Objective
) -> Iterator[Curve]:
    """What the graph as it came takes, and what one other plan takes."""
    problem = posed.problem
    dims = _by_tokens(posed, names)
    if dims is None or len(problem.incoming) > MOST_STEPS:
        return
    yield Curve("before", _amount(incoming_operations(problem, dims), objective))
    if changed and decision.plan is not None:
        yield Curve("after", _amount(decision.plan.operations(problem, dims), objective))
        return
    for other in () if changed else decision.alternatives:
        if not other.plan.runs_as_in(problem.incoming):
            form = first_step(problem, names, problem.demands[0], other.step)
            name = f"cheapest other plan, {shorten(form, _WIDTH, placeholder=' ...')}"
            yield Curve(name, _amount(other.plan.operations(problem, dims), objective))
            return


def _by_tokens(posed: PosedProblem, names: Names) -> Dims | None:
    """The dimensions as symbols; None if none of them is the number of tokens.

    Dimensions that have the same symbol in the graph vary together.
    """
    index = names.tokens
    if index is None or not names.symbols[index].is_Symbol:
        return None
    tokens = posed.dims[index]
    varies = [not isinstance(tokens, int) and size == tokens for size in posed.dims]
    pairs = zip(names.symbols, varies, strict=True)
    return tuple(names.symbols[index] if same else symbol for symbol, same in pairs)


def _amount(operations: Iterable[Operation], objective: Objective) -> sympy.Expr:
    """FLOPs, or the predicted time [s]."""
    if objective.name == "time":
        total = sum((objective.profile.formula(one) for one in operations), sympy.Integer(0))
    else:
        total = sum((one.cost.flops for one in operations), sympy.Integer(0))
    return sympy.expand(sympy.sympify(total))
