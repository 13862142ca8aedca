"""Rules: which step of a plan a node was written for, as a short text.

    node.meta["runlora"] == "merged weight: primals_2 + 2 primals_4 primals_3"

A rule is stored as a tuple of texts and of leaf numbers. The text has names in the places of the
numbers. So the rules of equal steps of two layers differ in these numbers alone.

Invariant: rules are for people to read. No pass depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Literal, NamedTuple, TypeAlias

from torch import fx

from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import (
    Accumulate,
    GroupedOuter,
    GroupedProduct,
    Pick,
    ProductWithAll,
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


class Name(NamedTuple):
    """A placeholder for a name in a rule.

    Attributes:
        kind: What is named: a leaf, a scalar leaf, an assignment, or the root that is written.
        number: The number of the leaf or assignment; 0 for the root.
    """

    kind: Literal["matrix", "scalar", "assignment", "root"]
    number: int


#: What a node is written for, as texts and placeholders.
Rule: TypeAlias = tuple[str | Name, ...]

#: The rule of a copy that restores the strides of a root.
COPY: Rule = ("copy: the strides of ", Name("root", 0))


def text_of(rule: Rule, named: Callable[[Name], str]) -> str:
    """A rule as a text. A function gives the names, and long texts are cut off."""
    text = "".join([piece if isinstance(piece, str) else named(piece) for piece in rule])
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def name_in(leaves: Leaves, name: Name, root: str) -> str:
    """The name that a placeholder stands for in one graph.

    Args:
        leaves: The leaves of the graph.
        name: The placeholder.
        root: The name of the root that is written.
    """
    match name.kind:
        case "matrix":
            return leaves.matrices[name.number].origin.name
        case "scalar":
            return leaves.scalars[name.number].node.name
        case "assignment":
            return leaves.assignments[name.number].node.name
    return root


def rule_of(value: Value, step: Step, leaves: Leaves) -> Rule:
    """The rule of a step: its kind, and the formula by which it computes the value."""
    operands = step.operands
    if isinstance(step, Sum | Accumulate):
        addends = operands
        if isinstance(step, Accumulate):
            addends = (step.addend, step.left @ step.right)
        kind = "merged weight: " if _is_merged_weight(value, leaves) else "sum: "
        return (kind, *_joined(" + ", [_text(p) for p in addends]))
    texts = [_in_brackets(p) for p in operands]
    match step:
        case Unpack():
            return ("unpack: ", *_text(value.core))
        case Pick(_, k):
            return ("pick: ", *texts[0], "[", Name("assignment", k), "]")
        case Scatter(_, k) | GroupedOuter(_, _, k):
            name = Name("assignment", k)
            return ("sum by expert: sum_", name, "(", *_joined(" ", texts), ")")
        case ProductWithAll(_, _, k):
            name = Name("assignment", k)
            return ("product with all: (", *_joined(" ", texts), ")[", name, "]")
        case GroupedProduct(_, _, k, side):
            texts[side == "right"] += ("[", Name("assignment", k), "]")
            return ("grouped product: ", *_joined(" ", texts))
    if value.core.is_diag_part:
        return ("diagonal of a product: ", *_joined(" ", texts))
    if any(p.is_diagonal for p in operands):
        return ("scaling: ", *_joined(" ", texts))
    return ("product: ", *_joined(" ", texts))


def _is_merged_weight(value: Value, leaves: Leaves) -> bool:
    """True for ``W + s B A``: a matrix plus products without it, all made of the graph's inputs."""
    words = [word.factors for word in value.core.words]
    alone = {factors[0].leaf for factors in words if len(factors) == 1}
    multiplied = {factor.leaf for factors in words if len(factors) > 1 for factor in factors}
    if value.backward or not alone or not multiplied or alone & multiplied:
        return False
    return all(_is_of_inputs(leaves.matrices[i].sources) for i in value.core.leaves)


def _is_of_inputs(nodes: Sequence[fx.Node]) -> bool:
    """True if nodes are inputs of the graph, or views and casts of single inputs."""
    for node in nodes:
        while node.op == "call_function" and len(node.all_input_nodes) == 1:
            (node,) = node.all_input_nodes
        if node.op not in ("placeholder", "get_attr"):
            return False
    return bool(nodes)


def rule_of_root(root: Root) -> Rule:
    """The rule of the sum of a root's parts."""
    return ("sum: ", *_joined(" + ", [_text(p) for p in root.parts]))


def _joined(between: str, rules: list[Rule]) -> Rule:
    return tuple(chain.from_iterable((between, *rule) for rule in rules))[1:]


def _in_brackets(p: Polynomial) -> Rule:
    return _text(p) if len(p) == 1 else ("(", *_text(p), ")")


def _text(p: Polynomial) -> Rule:
    return _joined(" + ", [_term(word, c) for word, c in p.terms])


def _term(word: Word, c: float) -> Rule:
    scalars: list[Rule] = [(Name("scalar", i),) for i in word.scalars]
    factors = [_factor(factor) for factor in word.factors] or [("I",)]
    number: list[Rule] = [] if c == 1.0 else [(f"{c:g}",)]
    return _joined(" ", [*number, *scalars, *factors])


def _factor(factor: Factor) -> Rule:
    name = Name("matrix", factor.leaf)
    if factor.diagonal:
        return ("diag(", name, ")")
    return (name, "'") if factor.transposed else (name,)
