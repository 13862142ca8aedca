"""Reader: from a graph to matrix polynomials of leaves.

Example: ``linear(x, w) + 2 * linear(linear(x, a), b)`` is the root ``X W' + 2 X A' B'``.

Reading takes three steps: find the *linear* nodes (:mod:`linear`), find the *roots* among them
(:mod:`roots`), and read every linear node as a polynomial of leaves and roots
(:mod:`polynomial_reader`). The third step may find that an assumption was wrong: a vector is not
used as a diagonal matrix, or words cancel in a sum. Then the steps are repeated without it.

Invariant: the polynomial of a root is what the graph computes, up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from runlora_fx.passes.algebra.addends import Addends, total, transposed, without_cancelled
from runlora_fx.passes.algebra.polynomials import Polynomial, of_factors
from runlora_fx.passes.algebra.words import Factor, NotInNormalForm, Word
from runlora_fx.passes.levels.cuts import Cut, turned_vector
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.levels.sizes import shape_of
from runlora_fx.passes.read.casts import CastRules, Casts
from runlora_fx.passes.read.effects import Effects
from runlora_fx.passes.read.gradients import gradient_nodes
from runlora_fx.passes.read.leaves import Leaves
from runlora_fx.passes.read.linear import Linear, LinearFinder
from runlora_fx.passes.read.polynomial_reader import PolynomialReader, Tables
from runlora_fx.passes.read.roots import find_roots, sums_below
from runlora_fx.passes.read.value_numbers import ValueNumbers

#: A product of more words than this takes its operands as leaves instead.
_MAX_WORDS = 32


class GraphReader(PolynomialReader):
    """The linear algebra of one graph.

    Attributes:
        values: The number of every node's value.
        leaves: The leaves of all polynomials.
        forms: What each readable node computes; emission adds the nodes that it writes.
        linear: The linear nodes.
        roots: Linear nodes that something outside the linear region needs, in graph order.
        stops: The roots as a set. They are leaves of their users.
        casts: How casts between floats are read.
        gradients: The nodes that an incoming gradient reaches.
    """

    linear: Linear
    roots: list[fx.Node]
    stops: set[fx.Node]

    def __init__(
        self, graph: fx.Graph, dialect: Dialect, effects: Effects, *, casts: Casts = "joined"
    ) -> None:
        """Find the linear nodes and the roots, and read them as polynomials.

        Args:
            graph: Every tensor node has an example tensor in ``meta["val"]``.
            dialect: The level of the graph.
            effects: What the nodes do besides computing a value.
            casts: How casts between floats are read.
        """
        fixed = effects.fixed(dialect.is_readable)
        super().__init__(ValueNumbers(graph, effects, fixed), Leaves(), {})
        self.casts = casts
        self._dialect = replace(dialect, unread=fixed)
        self._nodes = tuple(graph.nodes)
        self.gradients = gradient_nodes(graph)
        # Nodes that are not read because words cancel in them.
        self._unread: set[fx.Node] = set()
        # The vectors that are read as diagonal matrices, as leaves; None until they are known.
        self._diagonals: set[int] | None = None
        self._addends: dict[fx.Node, Addends] = {}
        # Operands that were read already: each is read several times.
        self._operands: dict[tuple[fx.Node, Cut], Addends] = {}
        self._find()
        while not self._read_all():
            self._addends.clear()
            self._operands.clear()

    @property
    def cuts(self) -> Mapping[fx.Node, Cut]:
        """The cut through which each linear node shows its matrix."""
        return self.linear.cuts

    def expression(self, root: fx.Node) -> Polynomial:
        """The polynomial of a linear node, in leaves and other roots."""
        return total(self._addends[root])

    def addends(self, root: fx.Node) -> Addends:
        """The polynomial of a linear node as the addends that the graph adds up."""
        return self._addends[root]

    def operand(self, node: fx.Node, cut: Cut) -> Addends:
        """Any tensor, seen through a cut. Roots and nodes that are not linear are leaves."""
        found = self._operands.get((node, cut))
        if found is None:
            found = self._operands[node, cut] = self._operand(node, cut)
        return found

    def _operand(self, node: fx.Node, cut: Cut) -> Addends:
        if node in self.stops:
            return self._root(node, cut)
        below: Addends | None = None
        if node not in self.cuts:
            form = self.forms.get(node)
            below = None if form is None or form.is_leaf_alone else self.as_addends(node, cut)
        elif self.linear.shows(node, cut):
            below = self._addends[node]
        elif node not in self.linear.vectors and turned_vector(
            shape_of(node), self.cuts[node], cut
        ):
            below = transposed(self._addends[node])
        return (self.leaves.matrix(self.values, node, cut),) if below is None else below

    def _root(self, node: fx.Node, cut: Cut) -> Addends:
        """A root as a leaf. A root that is a view of another leaf is that leaf."""
        form = self.forms.get(node)
        below = self.as_addends(node, cut) if form is not None and form.is_view else None
        if below is not None and len(below) == 1:
            leaf = below[0].leaf
            if leaf is not None and below[0] == of_factors((leaf,)):
                return below
        return (self.leaves.matrix(self.values, node, cut),)

    def factors_at(self, node: fx.Node) -> list[tuple[Addends, ...]]:
        """The operands of every product that a linear node computes."""
        return self.forms[node].factors(self.cuts[node], self)

    def is_read(self, node: fx.Node) -> bool:
        """True if a node has a form, or is a part of one that has."""
        return node in self.forms or node in self.linear.absorbed

    def classify(self, node: fx.Node) -> None:
        """Find the form of a node that was written after the graph was read."""
        form = self._finder.form_of(node)
        if form is not None:
            self.forms[node] = form

    # -- steps ---------------------------------------------------------------------------------

    def _find(self) -> None:
        """The linear nodes and the roots, with what is known so far."""
        self.forms = {}
        rules = CastRules(self._dialect, self.casts)
        # Tables of their own, not this reader: a cycle of references would be freed only by a
        # garbage collection.
        tables = Tables(self.values, self.leaves, self.forms)
        self._finder = LinearFinder(
            self._dialect, rules, tables, self.gradients, self._unread, self._diagonals
        )
        self.linear = self._finder.find(self._nodes)
        self.roots = find_roots(self.linear)
        self.stops = set(self.roots)

    def _read_all(self) -> bool:
        """Read every linear node as a polynomial; False if the roots changed and it must be redone.

        If a polynomial becomes too large, the operands of its node become roots. If words cancel in
        a sum, the node is not read: code that subtracts what it added relies on rounding
        (compensated sums, straight-through estimators).
        """
        for node, cut in self.cuts.items():
            try:
                addends = self.as_addends(node, cut)
            except NotInNormalForm:  # such as a pick of what was scattered
                self._unread.add(node)
                self._find()
                return False
            assert addends is not None, f"{node.name} is linear but shows no matrix"
            is_large = any([len(p.terms) > _MAX_WORDS for p in addends])
            if is_large and self.forms[node].multiplies and self._stop_operands(node):
                return False
            if self._cancels(node, addends):
                self._unread.add(node)
                self._find()
                return False
            self._addends[node] = without_cancelled(addends)
        return self._settle_diagonals()

    def _settle_diagonals(self) -> bool:
        """Settle which vectors are diagonal matrices; False if others were read as such so far."""
        needed: set[int] = set()
        for node in self.cuts:
            if node not in self.gradients and self.forms[node].scaling_vector is not None:
                needed |= self._scaled_by(node)
        if needed == (self._diagonals or set()):
            self._diagonals = needed
            return True
        self._diagonals = needed if self._diagonals is None else self._diagonals & needed
        self._find()
        return False

    def _scaled_by(self, node: fx.Node) -> frozenset[int]:
        """The leaves of the vector by which a node scales a product, or the rows of a leaf."""
        form = self.forms[node]
        if form.scaling_vector is None:
            return frozenset()
        source = form.sources[0]
        words = total(self.operand(source, self.cuts[node])).words
        if source in self.cuts and all(len(word.without_diagonals) < 2 for word in words):
            return frozenset()
        return self.diagonal(form.scaling_vector).leaves

    def _cancels(self, node: fx.Node, addends: Addends) -> bool:
        """True if a word that a linear node adds up cancels in the sum.

        Two cases do not count: a bias that is subtracted again, and ``P + P (diag(g) - I)``, which
        is ``P diag(g)``.
        """
        written = self._multiplied_words(node)
        if len(addends) == 1 and not written:
            return not addends[0].terms
        written.update([word for p in addends for word in p.words])
        left_over = total(addends).words
        scaled = {word.without_diagonals for word in left_over if word.factors}
        lost = written.difference(left_over)
        return not left_over or not all(
            word.without_diagonals in scaled or any(map(self._is_ones, word.factors))
            for word in lost
        )

    def _multiplied_words(self, node: fx.Node) -> set[Word]:
        """The words of the products of two sums that a node multiplies, before cancellation."""
        found: set[Word] = set()
        for product in self.forms[node].products:
            left, right = map(total, product.operands(self))
            if len(left.terms) > 1 and len(right.terms) > 1:
                words = [[Polynomial(((w, 1.0),)) for w in p.words] for p in (left, right)]
                found |= {self.multiplied(u, v).words[0] for u in words[0] for v in words[1]}
        return found

    def _is_ones(self, factor: Factor) -> bool:
        return self.leaves.matrices[factor.leaf].is_ones

    def _stop_operands(self, node: fx.Node) -> bool:
        """Make the sums below a product roots, so that its polynomial stays small."""
        found = sums_below(self.linear, node, self.stops)
        self.stops.update(found)
        self.roots = [linear for linear in self.cuts if linear in self.stops]
        return bool(found)
