"""Incoming steps: the steps by which the incoming graph computes its values, in order.

Example: ``addmm(b, x, w)`` takes two steps: the product ``X W``, and its sum with the repeated
``b``.

For a joint graph this module also finds the values of the forward that the backward reads. They are
saved, so a plan may use them for free.

Invariant: every part of a root that is no leaf is made by some step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

from torch import fx

from runlora_fx.passes.algebra.addends import Addends, total
from runlora_fx.passes.algebra.polynomials import (
    Polynomial,
    Scalar,
    normalise,
    of_factors,
    without_scalar,
)
from runlora_fx.passes.algebra.steps import GroupedOuter, Product, Scatter, Sum
from runlora_fx.passes.levels.forms import DiagonalOfProduct, MatrixProduct
from runlora_fx.passes.levels.forms.assigned import AssignedForm
from runlora_fx.passes.read.made import Made
from runlora_fx.passes.read.phases import Phases, recomputed
from runlora_fx.passes.read.reader import GraphReader


class Incoming:
    """The steps of a graph.

    Attributes:
        steps: In graph order.
        kept: The values of the forward that the backward reads.
        keepable: Values that could be saved instead of some of those, without more memory.
        read_backward: The leaves that are operands of steps of the backward.
    """

    def __init__(
        self, reader: GraphReader, phases: Phases, parts: Mapping[fx.Node, tuple[Polynomial, ...]]
    ) -> None:
        """Find the steps.

        Args:
            reader: The linear algebra of the graph.
            phases: The phase of its nodes.
            parts: By root, its independent parts.
        """
        self._reader = reader
        self._phases = phases
        self._parts = parts
        self._forward: dict[Polynomial, Made] = {}
        self._diagonal_parts: dict[Polynomial, Made] = {}
        self.kept: set[Polynomial] = set()
        self.keepable: set[Polynomial] = set()
        self.read_backward: set[int] = set()
        self.steps: list[Made] = []
        for node in reader.cuts:
            for made in self._made_at(node):
                self._add(made)

    def _add(self, made: Made) -> None:
        """Add a step, and note what the backward reads."""
        core = normalise(made.polynomial).core
        self.steps.append(made)
        if made.diag_part:
            self._diagonal_parts[core] = made
        if not made.backward:
            self._forward.setdefault(core, made)
            return
        for operand in made.operands:
            factor = operand.leaf
            if factor is not None:
                self.read_backward.add(factor.leaf)
            self._fetch(operand)
        self._may_keep(made)
        self._may_keep_low(made)

    # -- one node ------------------------------------------------------------------------------

    def _made_at(self, node: fx.Node) -> Iterator[Made]:
        """The steps that one linear node takes."""
        backward = self._phases.runs_backward(node)
        for operands in self._reader.factors_at(node):
            for operand in operands:
                if len(operand) > 1:
                    yield Made.sum_of(operand, backward and self._in_backward(operand), node)
            made = self._multiplied(node, operands, backward)
            if all([_has_factors(p) for p in made.operands]):
                yield made  # multiplying by the identity is no step
        addends = self._reader.addends(node)
        if node not in self._reader.stops:
            return
        is_fetched = backward and self._shows_forward(node)
        if len(addends) < 2 and not is_fetched:
            return
        for part in self._parts[node]:
            if is_fetched and normalise(part).core in self._forward:
                self._fetch(part)
                continue
            words = set(part.words)
            mine = tuple([p for p in addends if not words.isdisjoint(p.words)])
            if len(mine) > 1:
                yield Made.sum_of(mine, backward, node)

    def _multiplied(self, node: fx.Node, operands: tuple[Addends, ...], backward: bool) -> Made:
        """The product that a node computes of some operands."""
        form = self._reader.forms[node]
        if isinstance(form, AssignedForm):
            step, made = form.step(self._reader)
            return Made(step, made, backward, node)
        left, right = map(total, operands)
        if isinstance(form, MatrixProduct | DiagonalOfProduct):
            (made,) = self._reader.addends(node)
        else:
            made = self._reader.multiplied(left, right)
        return Made(Product(left, right), made, backward, node)

    def _in_backward(self, addends: Addends) -> bool:
        """True if a sum contains a gradient. Otherwise the forward may have computed it already."""
        leaves = total(addends).leaves
        nodes = (node for i in leaves for node in self._reader.leaves.matrices[i].sources)
        return any(node in self._phases.gradients for node in nodes)

    # -- what the backward reads ---------------------------------------------------------------

    def _shows_forward(self, node: fx.Node) -> bool:
        """True if a root of the backward only views or scales what the forward made."""
        while node in self._reader.cuts and self._phases.runs_backward(node):
            form = self._reader.forms[node]
            if form.adds or form.multiplies or form.scaling_vector is not None:
                return False
            node = form.sources[0]
        return node in self._reader.cuts

    def _fetch(self, p: Polynomial) -> None:
        """Note how the backward gets a value of the forward: saved, or recomputed."""
        core = normalise(p).core
        below = self._forward.get(core)
        if below is None:
            return
        if not recomputed(below.node):
            self.kept.add(core)
            return
        self.steps.append(replace(below, backward=True))
        for operand in below.operands:
            self._fetch(operand)

    def _may_keep(self, made: Made) -> None:
        """If all addends of a backward sum are saved already, allow saving the sum instead.

        For ``diag_part(L P) + diag_part(L Q)``, allow saving ``P + Q`` instead of P and Q.
        """
        if not isinstance(made.step, Sum):
            return
        addends = made.operands
        if made.polynomial.is_diag_part:
            addends = self._behind_common_factor(made.operands)
        cores = [normalise(p).core for p in addends]
        if len(cores) > 1 and self.kept.issuperset(cores):
            self.keepable.add(normalise(total(addends)).core)

    def _may_keep_low(self, made: Made) -> None:
        """Allow saving ``X L[k]`` if the backward makes a gradient for all experts.

        The gradient of R can be computed from it. A graph that merges ``W + L R`` does not have it.
        """
        if not isinstance(made.step, GroupedOuter | Scatter):
            return
        leaves = self._reader.leaves.matrices
        for below in self._forward.values():
            if below.polynomial.leaves.isdisjoint(made.polynomial.leaves):
                continue
            for word in below.polynomial.words:
                for pair in pairwise(word.factors) if len(word.factors) > 2 else ():
                    is_picked = [leaves[factor.leaf].picked is not None for factor in pair]
                    if any(is_picked) and not all(is_picked):
                        self.keepable.add(normalise(of_factors(pair)).core)

    def _behind_common_factor(self, sums: Addends) -> Addends:
        """P and Q of ``diag_part(L P)`` and ``diag_part(L Q)``; nothing if there is no common L."""
        found, lefts = [], set()
        for p in sums:
            made = self._diagonal_parts.get(normalise(p).core)
            if made is None:
                return ()
            (by, left), right = without_scalar(made.operands[0]), made.operands[1]
            lefts.add(left)
            front = normalise(p).scalar.number / normalise(made.polynomial).scalar.number
            found.append(right.scaled(by).scaled(Scalar(front)))
        return tuple(found) if len(lefts) == 1 else ()


def _has_factors(p: Polynomial) -> bool:
    """True if a polynomial is more than a multiple of the identity."""
    return any([word.factors for word, _ in p.terms])
