"""Linear nodes: products, and sums, multiples and views of products.

Example: of ``y = relu(mm(x, w) + b)`` the product and the sum are linear, the activation is not.

Invariant: a linear node shows its matrix through its cut, for all values of symbolic sizes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from runlora_fx.passes.levels.cuts import Cut, same_matrix
from runlora_fx.passes.levels.forms import Cast, Form, Permute
from runlora_fx.passes.levels.forms.assigned import STACK, SumOfRows
from runlora_fx.passes.levels.forms.form import Factors
from runlora_fx.passes.levels.level import Dialect, asks_about
from runlora_fx.passes.levels.sizes import TensorFacts, example_of, facts_of, shape_of
from runlora_fx.passes.read.asked_sizes import held_elsewhere
from runlora_fx.passes.read.casts import CastRules
from runlora_fx.passes.read.polynomial_reader import Tables


class _Cuts:
    """The cuts of linear nodes, as forms ask for them."""

    cuts: Mapping[fx.Node, Cut]

    def cut_of(self, node: fx.Node) -> Cut | None:
        """The cut of a linear node; None for any other."""
        return self.cuts.get(node)

    def shows(self, node: fx.Node, cut: Cut) -> bool:
        """True if a cut shows the matrix that a linear node is computed as."""
        own = self.cuts[node]
        return own == cut or same_matrix(shape_of(node), own, cut)


@dataclass(frozen=True)
class Linear(_Cuts):
    """The linear nodes of a graph.

    Attributes:
        forms: What each readable node computes.
        cuts: The cut through which each linear node shows its matrix, in graph order.
        vectors: Linear nodes that are diagonals of products, or sums of such diagonals.
        widened: Casts of products to a wider dtype that only feed sums, and these sums.
        absorbed: Nodes that are read as a part of their user.
        asked_sizes: By call that reads a size of a linear node, another tensor with this size, and
            its dimension.
        asking: Calls that read the dtype or device of a tensor.
    """

    forms: Mapping[fx.Node, Form]
    cuts: Mapping[fx.Node, Cut]
    vectors: Collection[fx.Node]
    widened: Collection[fx.Node]
    absorbed: Collection[fx.Node]
    asked_sizes: Mapping[fx.Node, tuple[fx.Node, int]]
    asking: Collection[fx.Node]

    @cached_property
    def _indirect(self) -> frozenset[fx.Node]:
        """The nodes that do not count, or need not count, as users of what they read."""
        return frozenset([*self.asked_sizes, *self.absorbed, *self.asking])

    def users_of(self, node: fx.Node) -> list[fx.Node]:
        """The users that need the elements of a node.

        A user that is absorbed is replaced by the nodes that it is a part of. A user that reads
        only a size, dtype or device does not count if another tensor has the same
        (:meth:`stand_in`).
        """
        if self._indirect.isdisjoint(node.users):
            return list(node.users)
        users = [user for user in node.users if user not in self.asked_sizes]
        if any(map(asks_about, users)) and self.stand_in(node) is not None:
            users = [user for user in users if not asks_about(user)]
        readers = (list(u.users) if u in self.absorbed else [u] for u in users)
        return list(dict.fromkeys(reader for group in readers for reader in group))

    def stand_in(self, node: fx.Node) -> fx.Node | None:
        """The first source of a node that has its dtype and device."""
        here = example_of(node)
        for source in self.forms[node].sources if node in self.forms else ():
            val = example_of(source)
            if val is None or here is None or val.device != here.device:
                continue
            if val.dtype == here.dtype:
                return source
        return None


class LinearFinder(_Cuts):
    """Finds the linear nodes of a graph, in graph order."""

    def __init__(
        self,
        dialect: Dialect,
        casts: CastRules,
        tables: Tables,
        gradients: Collection[fx.Node],
        unread: Collection[fx.Node],
        diagonals: Collection[int] | None,
    ) -> None:
        """Prepare to find them.

        Args:
            dialect: The level of the graph.
            casts: Which casts are read through.
            tables: Values and leaves of the graph; takes up the forms that are found.
            gradients: The nodes that depend on an incoming gradient.
            unread: Nodes that are not to be read.
            diagonals: The vectors that are read as diagonal matrices, as leaves; None until they
                are known.
        """
        self._dialect = dialect
        self._casts = casts
        self._tables = tables
        self._gradients = gradients
        self._unread = unread
        self._diagonals = diagonals
        self._facts: dict[fx.Node, TensorFacts | None] = {}
        self.cuts: dict[fx.Node, Cut] = {}
        self._vectors: set[fx.Node] = set()
        self._widened: set[fx.Node] = set()
        self._absorbed: set[fx.Node] = set()

    def find(self, nodes: Sequence[fx.Node]) -> Linear:
        """The linear nodes among those of a graph."""
        self._facts = {node: facts_of(node) for node in nodes}
        for node in nodes:
            self._classify(node)
        return Linear(
            self._tables.forms,
            self.cuts,
            self._vectors,
            self._widened,
            self._absorbed,
            held_elsewhere(nodes, self.cuts),
            [node for node in nodes if node.target is getattr and asks_about(node)],
        )

    def form_of(self, node: fx.Node) -> Form | None:
        """What a node computes; None if it is not read."""
        facts = self._facts.get(node) or facts_of(node)
        if facts is None or not facts.is_plain or node in self._unread:
            return None
        form = self._dialect.read(node)
        is_converted = False
        if isinstance(form, Cast):
            cast = self._casts.resolve(node, form, self._tables.forms, self.cuts)
            if cast is None:
                return None
            form, is_converted = cast.form, cast.widens or cast.is_undone
            if cast.widens:
                self._widened.add(node)
        if form is None or not form.is_readable_at(node):
            return None
        if not is_converted and not self._keeps_dtype(facts, form):
            return None
        return form.led_by(self._gradients)

    def _classify(self, node: fx.Node) -> None:
        form = self.form_of(node)
        if form is None:
            return
        self._tables.forms[node] = form
        if form.absorbed:
            self._absorbed.update(form.absorbed)
        cut = form.cut(node, self)
        if cut is None:
            return
        self.cuts[node] = cut
        if form.is_vector(self._vectors):
            self._vectors.add(node)
        if self._widened and form.adds and not self._widened.isdisjoint(form.sources):
            self._widened.add(node)

    def _keeps_dtype(self, here: TensorFacts, form: Form) -> bool:
        """True if all operands have the node's own dtype: no hidden promotion."""
        for source in form.sources:
            there = self._facts.get(source) or facts_of(source)
            if there is None or there.kind is here.kind or source in form.scalars:
                continue
            is_crossed = self._casts.may_cross(there.kind.dtype, here.kind.dtype)
            if not is_crossed or there.kind.device != here.kind.device or not there.is_plain:
                return False
        return True

    # -- what forms ask ------------------------------------------------------------------------

    def is_only_added(self, node: fx.Node) -> bool:
        """True if every user adds the node to something: nobody relies on its memory."""
        forms = (self._dialect.read(user) for user in node.users)
        return all(form is not None and form.adds for form in forms)

    def is_only_added_by_expert(self, node: fx.Node) -> bool:
        """True if every user, behind views, adds up what each expert's tokens have."""
        users = self._dialect.users_of(node)
        forms = [(user, self._dialect.read(user)) for user in users]
        return bool(forms) and all(
            isinstance(form, SumOfRows)
            or (isinstance(form, Permute) and self.is_only_added_by_expert(user))
            for user, form in forms
        )

    def is_only_multiplied(self, node: fx.Node) -> bool:
        """True if every user, behind views, multiplies the node as a batch of matrices."""
        users = self._dialect.users_of(node)
        forms = [(user, self._dialect.read(user)) for user in users]
        return bool(forms) and all(
            form is not None
            and (
                any(_multiplies_batch(product, node) for product in form.products)
                or (form.is_view and self.is_only_multiplied(user))
            )
            for user, form in forms
        )

    def is_made_of_product(self, node: fx.Node) -> bool:
        """True if a product of matrices is added up, scaled, viewed or cast to the node."""
        return self._dialect.is_made_of_product(node)

    def may_scale(self, node: fx.Node, source: fx.Node, vector: fx.Node, *, rows: bool) -> bool:
        """True if scaling by a vector is to be read as a product with a diagonal matrix.

        It is if that may help: if the forward scales a product by the vector, or the rows of a leaf
        that is also multiplied as it is; then so are the gradients that the backward scales by it.
        Otherwise what is scaled is a leaf: no norm's weight is ever folded into the layer behind.
        """
        if self._diagonals is not None:
            return all(leaf in self._diagonals for leaf in self._tables.diagonal(vector).leaves)
        if node in self._gradients:
            return False
        if source not in self.cuts:
            return rows and self._meets_product(source)
        return all(self._dialect.read(user) for user in self._dialect.users_of(source))

    def _meets_product(self, node: fx.Node) -> bool:
        """True if a product of the forward takes a node as it is, or a view of it."""
        for user in node.users:
            form = None if user in self._gradients else self._dialect.read(user)
            if form is None:
                continue
            is_view = form.same_elements_as is not None
            if form.products or (is_view and self._meets_product(user)):
                return True
        return False


def _multiplies_batch(product: Factors, node: fx.Node) -> bool:
    """True if a product takes a node of three dimensions as a batch of matrices."""
    return any(side.node is node and side.cut == STACK for side in (product.left, product.right))
