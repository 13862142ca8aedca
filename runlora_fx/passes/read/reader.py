"""Reading: from a graph to matrix polynomials over leaves.

Three passes over the nodes. The first finds the *linear* nodes: products, and what is made of
products by sums, scalars and views. The second finds the *roots* among them: values that something
else needs, which are materialised whatever we do. The third writes every linear node as a
polynomial of the leaves and roots below it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import fx

from runlora_fx.passes.algebra.polynomials import Factor, Polynomial
from runlora_fx.passes.levels.cuts import (
    Cut,
    last_dim_cut,
    permuted_cut,
    recut,
    repetition,
    same_matrix,
)
from runlora_fx.passes.levels.forms import (
    Cast,
    Copy,
    Dots,
    Form,
    Operand,
    Permute,
    Product,
    Reshape,
    Scale,
    Stretch,
    Sum,
    products,
)
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.levels.sizes import Shape, same_shape, same_strides, shape_of, value_of
from runlora_fx.passes.read.effects import Effects
from runlora_fx.passes.read.expand import (
    Addends,
    Expander,
    is_made_of_product,
    sources,
    stretches,
    total,
    without_cancelled,
)
from runlora_fx.passes.read.gradients import gradient_nodes
from runlora_fx.passes.read.leaves import Leaves
from runlora_fx.passes.read.value_numbers import ValueNumbers

#: What casts between floats are taken for: borders of a region (``"kept"``), but not where sums of
#: products are widened (``"joined"``), or nothing (``"crossed"``): of a leaf to a wider dtype, and
#: of what is linear to any.
Casts: TypeAlias = Literal["kept", "joined", "crossed"]

#: The dtypes between which casts may be crossed.
_CROSSED = frozenset([torch.float32, torch.bfloat16, torch.float16])

#: A product that expands into more words than this takes its operands as leaves instead.
_MAX_WORDS = 32


class GraphReader(Expander):
    """The linear algebra of one graph.

    Attributes:
        forms: What each readable node computes.
        cuts: The cut through which each linear node shows its matrix.
        roots: Linear nodes that something outside the linear region needs, in graph order.
        stops: The same as a set: their consumers take them as leaves.
        vectors: Linear nodes that are dots, or sums of such.
        leaves: The leaves of all polynomials.
        casts: What casts between floats are taken for.
    """

    def __init__(
        self,
        graph: fx.Graph,
        dialect: Dialect,
        effects: Effects,
        *,
        casts: Casts = "joined",
    ) -> None:
        """Find the linear nodes and the roots, and expand them.

        Args:
            graph: Every tensor node has an example tensor in ``meta["val"]``.
            dialect: The level of the graph.
            effects: What the nodes do besides computing a value.
            casts: What casts between floats are taken for.
        """
        fixed = effects.fixed(lambda node: dialect.read(node) is not None)
        super().__init__(ValueNumbers(graph, effects, fixed), Leaves(), {})
        self._dialect = replace(dialect, unread=fixed)
        self._unread: set[fx.Node] = set()
        self.casts = casts
        # Casts of products to a wider dtype, and the sums that they are only made for.
        self._widened: set[fx.Node] = set()
        # Casts that are undone at once.
        self._transient: set[fx.Node] = set()
        self._addends: dict[fx.Node, Addends] = {}
        self._tangent = gradient_nodes(graph)
        # The vectors that are read as diagonal matrices, as leaves; None until they are known.
        self._diagonals: set[int] | None = None
        self.cuts: dict[fx.Node, Cut] = {}
        self.roots: list[fx.Node] = []
        self.stops: set[fx.Node] = set()
        self.vectors: set[fx.Node] = set()
        self._find_roots(graph)
        while not self._expand_all():
            self._addends.clear()

    def expression(self, root: fx.Node) -> Polynomial:
        """The polynomial of a linear node in leaves and other roots."""
        return total(self._addends[root])

    def addends(self, root: fx.Node) -> Addends:
        """The same as the graph adds it up, nested sums flattened."""
        return self._addends[root]

    def operand(self, node: fx.Node, cut: Cut) -> Addends:
        """Any tensor, seen through a cut; roots and what is not linear are leaves."""
        if node not in self.stops:
            if node not in self.cuts:
                is_leaf = isinstance(self.forms.get(node), Sum | Stretch)
                below = None if is_leaf else self.expand(node, cut)
                if below is not None:
                    return below
            elif self._shows(node, cut):
                return self._addends[node]
        return (self.leaves.matrix(self.values, node, cut),)

    def factors_at(self, node: fx.Node) -> list[tuple[Addends, Addends]]:
        """The operands of every product that a linear node computes."""
        form = self.forms[node]
        if isinstance(form, Stretch):
            source = self.operand(form.source, self.cuts[node])
            diagonal = (self.diagonal(form.by),)
            return [(diagonal, source) if form.rows else (source, diagonal)]
        if isinstance(form, Dots):
            return [self.factors(form)]
        return [self.factors(product) for product in products(form)]

    def classify(self, node: fx.Node) -> None:
        """Find a node's form, and whether it is linear."""
        if node in self._unread or not _is_plain(node):
            return
        form = self._dialect.read(node)
        if isinstance(form, Cast):
            form = self._resolve_cast(node, form)
        if isinstance(form, Copy) and not _same_layout(node, form.source):
            return  # e.g. made contiguous: whoever flattens it next wants the copy
        if form is None or not self._keeps_dtype(node, form):
            return
        if isinstance(form, Dots):
            form = self._tangent_first(form)
        self.forms[node] = form
        cut = self._natural_cut(node, form)
        if cut is not None:
            self.cuts[node] = cut
            if self._is_vector(form):
                self.vectors.add(node)
            if isinstance(form, Sum) and not self._widened.isdisjoint(sources(form)):
                self._widened.add(node)

    # -- what is linear ------------------------------------------------------------------------

    def _tangent_first(self, form: Dots) -> Dots:
        """The same dots with the tangent on the left, so that like ones share their factors."""
        left, right = form.left, form.right
        if left.node in self._tangent or right.node not in self._tangent:
            return form
        left, right = (Operand(o.node, o.cut, not o.transposed) for o in (right, left))
        return Dots(left, right, form.out)

    def _resolve_cast(self, node: fx.Node, form: Cast) -> Form | None:
        """A cast to the same dtype, or back from a wider one, changes nothing."""
        here, source = value_of(node), value_of(form.source)
        if here is None or source is None or here.device != source.device:
            return None
        if here.dtype == source.dtype:
            return Reshape(form.source)
        origin = self._cast_back(form.source, here, source.dtype)
        if origin is not None:
            return Reshape(origin)
        if self._is_cast_back(node, source.dtype):
            self._transient.add(node)
            return Reshape(form.source)
        if self._is_widened_addend(node, form):
            self._widened.add(node)
            return Reshape(form.source)
        if self._may_cross(here.dtype, source.dtype):
            widens = torch.promote_types(here.dtype, source.dtype) == here.dtype
            # A weight cast down is another, rounded weight: only what is computed may be.
            if widens or form.source in self.cuts:
                return Reshape(form.source)
        return None

    def _cast_back(self, node: fx.Node, to: torch.Tensor, via: torch.dtype) -> fx.Node | None:
        """What a node, or what it is a view of, was cast from, if a cast back loses nothing."""
        while True:
            outer = self._dialect.read(node)
            origin = value_of(outer.source) if isinstance(outer, Cast) else None
            if (
                isinstance(outer, Cast)
                and origin is not None
                and (origin.dtype, origin.device) == (to.dtype, to.device)
                and torch.promote_types(origin.dtype, via) == via
            ):
                return outer.source
            view = self.forms.get(node)
            if not isinstance(view, Reshape):
                return None
            node = view.source

    def _is_cast_back(self, node: fx.Node, source: torch.dtype) -> bool:
        """Whether a cast to a wider dtype is undone by all that read it."""
        here = value_of(node)
        return (
            here is not None
            and torch.promote_types(source, here.dtype) == here.dtype
            and bool(node.users)
            and all(
                isinstance(self._dialect.read(user), Cast)
                and (val := value_of(user)) is not None
                and (val.dtype, val.device) == (source, here.device)
                for user in node.users
            )
        )

    def _is_widened_addend(self, node: fx.Node, form: Cast) -> bool:
        """Whether products are cast to a wider dtype only to be added up.

        Autocast adds the gradients of an activation up so. Each was rounded to the narrower dtype,
        and so may their sum be.
        """
        return (
            self.casts != "kept"
            and form.source in self.cuts
            and self._widens(node)
            and bool(node.users)
            and all(map(self._adds_widened, node.users))
        )

    def _widens(self, node: fx.Node) -> bool:
        """Whether a node casts what is made of a product to a wider dtype."""
        form, here = self._dialect.read(node), value_of(node)
        source = value_of(form.source) if isinstance(form, Cast) else None
        return (
            isinstance(form, Cast)
            and here is not None
            and source is not None
            and _CROSSED.issuperset([here.dtype, source.dtype])
            and source.dtype != here.dtype == torch.promote_types(source.dtype, here.dtype)
            and is_made_of_product(self._dialect, form.source)
        )

    def _adds_widened(self, node: fx.Node) -> bool:
        """Whether a node adds up nothing but what was widened."""
        form = self._dialect.read(node)
        return isinstance(form, Sum) and all(
            isinstance(term, fx.Node) and (self._widens(term) or self._adds_widened(term))
            for term, _ in form.terms
        )

    def _keeps_dtype(self, node: fx.Node, form: Form) -> bool:
        """Whether all operands have the node's own dtype: no hidden promotion."""
        here = value_of(node)
        if node in self._widened or node in self._transient:
            return True
        return here is not None and all(
            (val := value_of(source)) is None
            or (isinstance(form, Scale) and source is form.by)
            or (
                (val.dtype == here.dtype or self._may_cross(val.dtype, here.dtype))
                and val.device == here.device
                and _is_plain(source)
            )
            for source in sources(form)
        )

    def _may_cross(self, *dtypes: torch.dtype) -> bool:
        return self.casts == "crossed" and _CROSSED.issuperset(dtypes)

    def _natural_cut(self, node: fx.Node, form: Form) -> Cut | None:
        match form:
            case Product() | Dots():
                return form.out
            case Sum():
                return self._sum_cut(form, shape_of(node))
            case Scale(source):
                return self.cuts.get(source)
            case Stretch():
                return self._stretch_cut(node, form)
            case Copy(source) if self._is_only_added(node):
                return self.cuts.get(source)
            case Reshape(source) if source in self.cuts:
                return recut(shape_of(source), self.cuts[source], shape_of(node))
            case Permute(source, dims) if source in self.cuts:
                seen = permuted_cut(shape_of(source), self.cuts[source], dims)
                return seen and seen[0]
        return None

    def _is_vector(self, form: Form) -> bool:
        """Whether a form makes dots, or only scales, views or adds up such."""
        match form:
            case Dots():
                return True
            case Scale(source) | Reshape(source):
                return source in self.vectors
            case Sum(terms):
                nodes = sources(form)
                is_same = all(same_shape(shape_of(node), shape_of(nodes[0])) for node in nodes)
                return is_same and len(nodes) == len(terms) and self.vectors.issuperset(nodes)
        return False

    def _stretch_cut(self, node: fx.Node, form: Stretch) -> Cut | None:
        """Read as a product with a diagonal matrix what is scaled by a vector, if that may help.

        It may if the forward scales a product by the vector, or the rows of a leaf that is also
        multiplied as it is; then so are the tangents that the backward scales by it. Otherwise what
        is scaled is a leaf: no norm's weight is ever folded into the layer behind it.
        """
        shape, source = shape_of(node), form.source
        cut = self.cuts.get(source, last_dim_cut(len(shape)))
        if stretches(form, shape, cut) is None:
            return None
        if self._diagonals is not None:
            return cut if self.diagonal(form.by).leaves <= self._diagonals else None
        if node in self._tangent:
            return None
        if source not in self.cuts:
            return cut if form.rows and self._meets_product(source) else None
        return cut if all(self._dialect.read(user) for user in source.users) else None

    def _meets_product(self, node: fx.Node) -> bool:
        """Whether a product of the forward takes a node as it is, or a view of it."""
        for user in node.users:
            form = None if user in self._tangent else self._dialect.read(user)
            if isinstance(form, Reshape) and self._meets_product(user):
                return True
            if form is not None and products(form):
                return True
        return False

    def _is_only_added(self, node: fx.Node) -> bool:
        """Whether every user adds the node to something: nobody relies on its memory."""
        return all(isinstance(self._dialect.read(user), Sum) for user in node.users)

    def _sum_cut(self, form: Sum, shape: Shape) -> Cut | None:
        cut = None
        for term, _ in form.terms:
            if isinstance(term, Product):
                cut = cut or term.out
            elif term in self.cuts and same_shape(shape_of(term), shape):
                cut = cut or self.cuts[term]
        if cut is None:
            return None
        fits = all(
            same_shape(term, shape) or ((lies := repetition(term, shape, cut)) and lies.rows)
            for term in (shape_of(term) for term, _ in form.terms if isinstance(term, fx.Node))
        )
        return cut if fits else None

    # -- what is a root ------------------------------------------------------------------------

    def _shows(self, node: fx.Node, cut: Cut) -> bool:
        """Whether a cut shows the matrix that a linear node is made as."""
        return same_matrix(shape_of(node), self.cuts[node], cut)

    def _find_roots(self, graph: fx.Graph) -> None:
        self.forms.clear()
        self.cuts.clear()
        self.vectors.clear()
        self._widened.clear()
        self._transient.clear()
        for node in graph.nodes:
            self.classify(node)
        self.stops = set()
        for node in reversed(self.cuts):
            if not self._is_interior(node) or self._is_seen(node) or self._is_stream(node):
                self.stops.add(node)
        self.roots = [node for node in self.cuts if node in self.stops]

    def _is_seen(self, node: fx.Node) -> bool:
        """Whether a root shows the node as it is, in another shape or dtype, and others use it.

        It is there anyway: what they would otherwise expand, they would compute a second time.
        """
        return len(node.users) > 1 and any(
            user in self.stops and isinstance(self.forms[user], Reshape | Permute)
            for user in node.users
        )

    def _is_stream(self, node: fx.Node) -> bool:
        """Whether a sum is both multiplied and added to, as a residual stream without norms is.

        Its polynomial would grow from layer to layer, and so would that of every product with it.
        """
        if not isinstance(self.forms[node], Sum) or len(node.users) < 2:
            return False
        is_added = any(isinstance(self.forms.get(user), Sum) for user in node.users)
        return is_added and self._is_multiplied(node)

    def _is_multiplied(self, node: fx.Node) -> bool:
        """Whether a product takes a node, or another view of it."""
        for user in node.users:
            form = self.forms.get(user)
            if form is None:
                continue
            if isinstance(form, Reshape | Permute) and self._is_multiplied(user):
                return True
            if any(node in (p.left.node, p.right.node) for p in products(form)):
                return True
        return False

    def _is_interior(self, node: fx.Node) -> bool:
        """Whether all users take the node as the matrix that it is made as."""
        return bool(node.users) and all(
            user in self.cuts
            and self._takes(user, node)
            # No matrix is made of dots: whatever else reads them takes them as a leaf.
            and (node not in self.vectors or user in self.vectors)
            # What was added up in a wider dtype is multiplied in it.
            and (node not in self._widened or user in self._widened)
            for user in node.users
        )

    def _takes(self, user: fx.Node, node: fx.Node) -> bool:
        def fits(product: Product | Dots) -> bool:
            return all(
                operand.node is not node or self._shows(node, operand.cut)
                for operand in (product.left, product.right)
            )

        match self.forms[user]:
            case Scale(source, by):
                return source is node and by is not node
            case Product() | Dots() as product:
                return fits(product)
            case Stretch(source, by):
                return source is node and by is not node and self._shows(node, self.cuts[user])
            case Sum(terms):
                shape, cut = shape_of(user), self.cuts[user]
                lies = repetition(shape_of(node), shape, cut)
                return all(
                    fits(term)
                    if isinstance(term, Product)
                    else term is not node or self._shows(node, lies.cut if lies else cut)
                    for term, _ in terms
                )
        return True

    # -- expansion -----------------------------------------------------------------------------

    def _expand_all(self) -> bool:
        """Expand every linear node; False if the roots had to change for it.

        They do where a node grows too large, whose operands become roots, and where words cancel.
        Whoever subtracts what it added relies on rounding (compensated sums, straight-through
        estimators), so such a node is not read.
        """
        for node, cut in self.cuts.items():
            addends = self.expand(node, cut)
            assert addends is not None, f"{node.name} is linear but shows no matrix"
            multiplies = products(self.forms[node]) or isinstance(self.forms[node], Dots)
            is_large = multiplies and max(map(len, addends)) > _MAX_WORDS
            if is_large and self._stop_operands(node):
                return False
            if self._cancels(node, addends):
                self._unread.add(node)
                self._find_roots(node.graph)
                return False
            self._addends[node] = without_cancelled(addends)
        return self._settle_diagonals()

    def _settle_diagonals(self) -> bool:
        """Know the vectors to read as diagonal matrices; False if others were read as such."""
        needed: set[int] = set()
        for node, cut in self.cuts.items():
            form = self.forms[node]
            if isinstance(form, Stretch) and node not in self._tangent:
                scaled = total(self.operand(form.source, cut))
                is_leaf = form.source not in self.cuts
                if is_leaf or any(len(word.without_diagonals) > 1 for word in scaled.words):
                    needed |= self.diagonal(form.by).leaves
        if needed == (self._diagonals or set()):
            self._diagonals = needed
            return True
        self._diagonals = needed if self._diagonals is None else self._diagonals & needed
        self._find_roots(next(iter(self.cuts)).graph)
        return False

    def _cancels(self, node: fx.Node, addends: Addends) -> bool:
        """Whether a word that a linear node adds up is not in the sum.

        A bias may be taken off again, and ``P + P (diag(g) - I)`` is ``P diag(g)``.
        """
        written = {word for p in addends for word in p.words}
        for product in products(self.forms[node]):
            left, right = map(total, self.factors(product))
            if len(left) > 1 and len(right) > 1:
                written |= {u @ v for u in left.words for v in right.words}
        left_over = total(addends).words
        scaled = {word.without_diagonals for word in left_over if word.factors}
        lost = written.difference(left_over)
        return not left_over or not all(
            word.without_diagonals in scaled or any(map(self._is_ones, word.factors))
            for word in lost
        )

    def _is_ones(self, factor: Factor) -> bool:
        return self.leaves.matrices[factor.leaf].is_ones

    def _stop_operands(self, node: fx.Node) -> bool:
        """Make the sums below a product roots, so that its polynomial stays small."""
        found = False
        pending = list(sources(self.forms[node]))
        while pending:
            source = pending.pop()
            if source not in self.cuts or source in self.stops:
                continue
            if isinstance(self.forms[source], Sum):
                self.stops.add(source)
                found = True
            else:
                pending.extend(sources(self.forms[source]))
        self.roots = [linear for linear in self.cuts if linear in self.stops]
        return found


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    return value_of(a) is not None and value_of(b) is not None and same_strides(a, b)


def _is_plain(node: fx.Node) -> bool:
    """Whether the node holds a dense floating-point tensor."""
    val = value_of(node)
    return val is not None and val.dtype.is_floating_point and val.layout == torch.strided
