"""What the pass found at one place of a graph: a site, or a refusal.

Invariant: plain data, so that a program can read it as well as a person.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy


@dataclass(frozen=True)
class Candidate:
    """A plan that was considered.

    Attributes:
        form: How it begins, in algebra.
        flops: FLOPs of its matrix products [FLOP].
    """

    form: str
    flops: int


@dataclass(frozen=True)
class Site:
    """One place where low-rank algebra was found, or where matrix products were changed.

    Attributes:
        modules: Dotted names of the modules it comes from.
        shapes: The sizes of its dimensions, ``N`` tokens, ``i`` in, ``o`` out, ``r`` rank.
        before: The algebra as it came, a line for every value.
        after: The algebra as it will run; equal to ``before`` where nothing was changed.
        flops_before: FLOPs of the matrix products that came [FLOP].
        flops_after: FLOPs of the matrix products that will run [FLOP].
        flops_before_expr: The same as an expression in the site's dimensions.
        flops_after_expr: The same as an expression in the site's dimensions.
        changed: Whether the graph was changed here.
        reason: Why it was changed or left alone.
        considered: The alternatives, cheapest first.
        break_even: For how many tokens it pays to merge the adapter into the base weight.
        is_exact: Whether no plan is cheaper than the best one that was found.
    """

    modules: tuple[str, ...]
    shapes: str
    before: str
    after: str
    flops_before: int
    flops_after: int
    flops_before_expr: sympy.Expr
    flops_after_expr: sympy.Expr
    changed: bool
    reason: str
    considered: tuple[Candidate, ...] = ()
    break_even: str = ""
    is_exact: bool = True


@dataclass(frozen=True)
class Refusal:
    """Something that looks like LoRA and was left alone.

    Attributes:
        reason: Why.
        nodes: Where: module or node names.
    """

    reason: str
    nodes: tuple[str, ...]
