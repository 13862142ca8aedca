"""Rules: which step of a plan a node was written for, as a short text.

    node.meta["runlora"] == "sum: primals_2 + 2 primals_4 primals_3"

Reports and debuggers show it. Invariant: it is for reading only; no pass decides by it.
"""

from __future__ import annotations

from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import (
    Accumulate,
    GroupedOuter,
    GroupedProduct,
    Pick,
    Scatter,
    Step,
    Sum,
    Unpack,
)
from runlora_fx.passes.algebra.words import Factor, Word
from runlora_fx.passes.read.leaves import Leaves
from runlora_fx.passes.read.regions import Root

#: Longer formulas are cut off [characters].
_LONGEST = 100


def rule_of(value: Value, step: Step, leaves: Leaves) -> str:
    """The rule and the formula that a step of a plan computes a value by."""
    operands = step.operands
    if isinstance(step, Sum):
        return _cut("sum: " + " + ".join(_text(p, leaves) for p in operands))
    if isinstance(step, Accumulate):
        product = step.left @ step.right
        return _cut(f"sum: {_text(step.addend, leaves)} + {_text(product, leaves)}")
    texts = [_in_brackets(p, leaves) for p in operands]
    match step:
        case Unpack():
            return _cut(f"unpack: {_text(value.core, leaves)}")
        case Pick(_, k):
            return _cut(f"pick: {texts[0]}[{leaves.assignments[k].node.name}]")
        case Scatter(_, k) | GroupedOuter(_, _, k):
            name = leaves.assignments[k].node.name
            return _cut(f"sum by expert: sum_{name}({' '.join(texts)})")
        case GroupedProduct(_, _, k, side):
            texts[side == "right"] += f"[{leaves.assignments[k].node.name}]"
            return _cut(f"grouped product: {' '.join(texts)}")
    left, right = texts
    if value.core.is_diag_part:
        return _cut(f"diagonal of a product: {left} {right}")
    if any(p.is_diagonal for p in operands):
        return _cut(f"scaling: {left} {right}")
    return _cut(f"product: {left} {right}")


def rule_of_root(root: Root, leaves: Leaves) -> str:
    """The rule and the formula that the parts of a root are put together by."""
    return _cut("sum: " + " + ".join(_text(p, leaves) for p in root.parts))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _in_brackets(p: Polynomial, leaves: Leaves) -> str:
    return _text(p, leaves) if len(p) == 1 else f"({_text(p, leaves)})"


def _text(p: Polynomial, leaves: Leaves) -> str:
    return " + ".join(_term(word, c, leaves) for word, c in p.terms)


def _term(word: Word, c: float, leaves: Leaves) -> str:
    scalars = [leaves.scalars[i].node.name for i in word.scalars]
    factors = [_factor(factor, leaves) for factor in word.factors] or ["I"]
    number = [] if c == 1.0 else [f"{c:g}"]
    return " ".join([*number, *scalars, *factors])


def _factor(factor: Factor, leaves: Leaves) -> str:
    leaf = leaves.matrices[factor.leaf]
    name = leaf.origin.name
    if leaf.diagonal:
        return f"diag({name})"
    return f"{name}'" if factor.transposed else name
