"""Variants of "Run LoRA Run" (arXiv 2312.03415), by the order in which a plan multiplies.

In the notation of the report, with Z = dY B and G = dY' X:

    forward1    Y = X W' + (X A') B'
    forward2    Y = X (W + B A)'
    backward1   dA = Z' X      dB = dY' (X A')   dX = dY W + Z A
    backward2   dA = Z' X      dB = G A'         dX = dY W + Z A
    backward3   dA = B' G      dB = G A'         dX = dY W + Z A
    backward4   dA = B' G      dB = G A'         dX = dY (W + B A)
    backward5   dA = Z' X      dB = dY' (X A')   dX = dY (W + B A)

Invariant: a name is only given if all products of the plan are those of the variant.
"""

from __future__ import annotations

from runlora_fx.cli.crossover.problem import DY, X
from runlora_fx.passes.algebra.plan import Plan
from runlora_fx.passes.algebra.polynomials import leaf, normalise
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.algebra.steps import Product, Step

#: By dA from G, dB from G, and dX with the merged weight: the number of the backward.
_BACKWARDS = {
    (False, False, False): 1,
    (False, True, False): 2,
    (True, True, False): 3,
    (True, True, True): 4,
    (False, False, True): 5,
}


def variants_of(problem: Problem, plan: Plan | None) -> str:
    """The forward and the backward that a plan coincides with, such as ``forward2, backward5``."""
    steps = dict(reversed(problem.incoming)) if plan is None else plan.steps
    y, db, da, dx = problem.demands
    forward = 2 if is_merged(steps[y]) else 1
    backward = _BACKWARDS.get((_uses_g(steps[da]), _uses_g(steps[db]), is_merged(steps[dx])))
    named = "no backward of the paper" if backward is None else f"backward{backward}"
    return f"forward{forward}, {named}"


def is_merged(step: Step) -> bool:
    """True if a step multiplies by a sum: by the weight with the adapter in it."""
    return isinstance(step, Product) and any(len(p.words) > 1 for p in step.operands)


def _uses_g(step: Step) -> bool:
    """True if a step multiplies G = dY' X."""
    g = normalise(leaf(DY).T @ leaf(X)).core
    return any(normalise(operand).core == g for operand in step.operands)
