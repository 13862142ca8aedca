"""Borders: where two neighbouring plans cost the same, solved for the number of tokens.

    4*N*i*o + 6*N*i*r + 6*N*o*r = 4*N*i*o + 4*N*i*r + 4*N*o*r + 4*i*o*r    ->    N = 2*i*o/(i + o)

FLOPs give a formula in the widths and the rank. Predicted times give one in the rank, with the
layer's widths and the device's rates filled in.

Invariant: a formula is exact for the cost model. Nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import sympy

from runlora_fx.cli.crossover.contenders import Contender, winners
from runlora_fx.cli.crossover.fields import Field
from runlora_fx.cost_model.ops import Operation
from runlora_fx.passes.algebra.plan import incoming_operations, total_cost
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.search.varying import Varying
from runlora_fx.report.describe.notation import Names

#: Coefficients below this share of the largest are rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Border:
    """Where one plan begins to win over another, with more tokens.

    Attributes:
        below: The letter of the plan that wins for fewer tokens.
        above: The letter of the plan that wins for more tokens.
        formula: The number of tokens from which on it does.
        at_rank: Its value for the layer, at the rank that was asked for [tokens].
    """

    below: str
    above: str
    formula: str
    at_rank: float


def borders(field: Field, known: Sequence[Contender], rank: int) -> list[Border]:
    """Where each winner begins to cost less than the graph as it came, and than its neighbour.

    A border between neighbours is left out if it does not lie between their cells.
    """
    by_letter = {contender.letter: contender for contender in known}
    found: dict[tuple[str, str], Border] = {}
    for pair, (column, at) in _nearest(field, known, rank).items():
        tokens = field.tokens[column]
        contenders = [by_letter[letter] for letter in pair]
        border = _border(field, field.layer.problem(tokens, at), contenders, rank)
        there = _border(field, field.layer.problem(tokens, at), contenders, at)
        if border is None or there is None:
            continue
        is_between = field.tokens[column - 1] <= there.at_rank <= tokens
        if is_between or by_letter[pair[0]].plan is None:
            found[pair] = border
    return [found[pair] for pair in sorted(found)]


def _nearest(
    field: Field, known: Sequence[Contender], rank: int
) -> dict[tuple[str, str], tuple[int, int]]:
    """By pair of plans, the column of the second and a rank, the nearest to the one asked for.

    There, operands lie as they do at the rank that was asked for.
    """
    came = next(contender.letter for contender in known if contender.plan is None)
    found: dict[tuple[str, str], tuple[int, int]] = {}
    rows = zip(field.ranks, winners(field, known), strict=True)
    for at, row in sorted(rows, key=lambda one: abs(one[0] - rank)):
        for column, (below, above) in enumerate(pairwise(row), start=1):
            if below != above:
                found.setdefault((below, above), (column, at))
                if above != came:
                    found.setdefault((came, above), (column, at))
    return found


def _border(field: Field, problem: Problem, of: Sequence[Contender], rank: int) -> Border | None:
    """The border between two plans; None if their costs do not cross, as at a tie."""
    below, above = of
    tokens, inputs, outputs, width = Names(problem).symbols
    layer = {inputs: field.layer.inputs, outputs: field.layer.outputs}
    is_by_time = field.basis.objective.name == "time"
    if is_by_time:
        dims = (tokens, *map(sympy.Integer, layer.values()), width)
        smooth = Varying.of(problem, frozenset(), field.basis.objective).objective
        first, second = (smooth.total(_operations(one, problem, dims)) for one in of)
    else:
        dims = (tokens, inputs, outputs, width)
        first, second = (total_cost(_operations(one, problem, dims)).flops for one in of)
    difference = sympy.expand(sympy.sympify(first) - sympy.sympify(second))
    slope, rest = difference.coeff(tokens, 1), difference.coeff(tokens, 0)
    if slope == 0 or sympy.expand(difference - slope * tokens - rest) != 0:
        return None
    solved = sympy.cancel(-rest / slope) if not is_by_time else -rest / slope
    at_rank = solved.subs({**layer, width: rank})
    if not at_rank.is_number or at_rank <= 0:
        return None
    shown = _rational(-rest, slope, width) if is_by_time else str(solved)
    return Border(below.letter, above.letter, shown, float(at_rank))


def _operations(
    contender: Contender, problem: Problem, dims: tuple[sympy.Expr, ...]
) -> list[Operation]:
    """The operations of a plan, with symbols for sizes."""
    if contender.plan is None:
        return incoming_operations(problem, dims)
    return contender.plan.operations(problem, dims)


def _rational(over: sympy.Expr, under: sympy.Expr, symbol: sympy.Symbol) -> str:
    """A quotient of polynomials in one symbol as text, its numbers with four digits."""
    top, bottom = _coefficients(over, symbol), _coefficients(under, symbol)
    scale = bottom[max(bottom)] if bottom else 1.0
    above = _polynomial({power: c / scale for power, c in top.items()}, symbol)
    below = _polynomial({power: c / scale for power, c in bottom.items()}, symbol)
    return above if below == "1" else f"({above}) / ({below})"


def _coefficients(of: sympy.Expr, symbol: sympy.Symbol) -> dict[int, float]:
    """The coefficients of a polynomial by power, without those that are rounding."""
    terms = {int(p[0]): float(c) for p, c in sympy.Poly(of, symbol).terms()}
    least = _ROUNDING * max(map(abs, terms.values()), default=0.0)
    return {power: c for power, c in terms.items() if abs(c) > least}


def _polynomial(terms: Mapping[int, float], symbol: sympy.Symbol) -> str:
    shown = []
    for power, c in sorted(terms.items()):
        name = {0: "", 1: f"{symbol}"}.get(power, f"{symbol}**{power}")
        number = "" if name and f"{c:.4g}" == "1" else f"{c:.4g}"
        shown.append("*".join(part for part in (number, name) if part))
    return " + ".join(shown).replace("+ -", "- ") or "0"
