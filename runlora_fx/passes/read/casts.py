"""Casts: which conversions between dtypes are read through.

Example: under autocast ``cast(cast(x, bf16), fp32)`` ends what is read, but in
``cast(mm(a, b), fp32) + cast(mm(c, d), fp32)`` the sum is read and cast as a whole.

A cast ends a region, unless it changes nothing: it casts to the same dtype, or back from a wider
one. The policy says which other casts are read through.

Invariant: a cast that is read through is a :class:`Reshape`, the same elements in another dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import fx

from runlora_fx.passes.levels.cuts import Cut
from runlora_fx.passes.levels.forms import Cast, Form, Reshape
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.levels.sizes import example_of

#: ``"kept"``: every cast ends a region, unless it changes nothing. ``"joined"``: a widening cast of
#: products that only feeds a sum moves behind the sum. ``"crossed"``: widening casts of leaves are
#: ignored, and all casts of what is linear.
Casts: TypeAlias = Literal["kept", "joined", "crossed"]

#: The dtypes between which casts may be crossed.
_CROSSED = frozenset([torch.float32, torch.bfloat16, torch.float16])


class ResolvedCast(NamedTuple):
    """A cast that is read through.

    Attributes:
        form: The tensor that it shows.
        widens: True if it casts products to a wider dtype only for a sum.
        is_undone: True if every user casts it back.
    """

    form: Form
    widens: bool = False
    is_undone: bool = False


@dataclass(frozen=True)
class CastRules:
    """The casts of one graph.

    Attributes:
        dialect: The level of the graph.
        policy: How casts between floats are read.
    """

    dialect: Dialect
    policy: Casts

    def resolve(
        self,
        node: fx.Node,
        form: Cast,
        forms: Mapping[fx.Node, Form],
        cuts: Mapping[fx.Node, Cut],
    ) -> ResolvedCast | None:
        """The form that a cast is read as; None if it ends the region.

        Args:
            node: The cast.
            form: Its form.
            forms: The forms of the nodes before it.
            cuts: The cuts of the linear nodes before it.
        """
        here, source = example_of(node), example_of(form.source)
        if here is None or source is None or here.device != source.device:
            return None
        if here.dtype == source.dtype:
            return ResolvedCast(Reshape(form.source))
        origin = self._cast_back(form.source, here, source.dtype, forms)
        if origin is not None:
            return ResolvedCast(Reshape(origin))
        if self._is_undone(node, source.dtype):
            return ResolvedCast(Reshape(form.source), is_undone=True)
        is_linear = form.source in cuts
        if is_linear and self._is_widened_addend(node):
            return ResolvedCast(Reshape(form.source), widens=True)
        if self.may_cross(here.dtype, source.dtype):
            widens = torch.promote_types(here.dtype, source.dtype) == here.dtype
            # A weight that is cast down is another, rounded weight. Only computed values may be.
            if widens or is_linear:
                return ResolvedCast(Reshape(form.source))
        return None

    def may_cross(self, *dtypes: torch.dtype) -> bool:
        """True if a cast between dtypes may be ignored."""
        return self.policy == "crossed" and _CROSSED.issuperset(dtypes)

    def _cast_back(
        self, node: fx.Node, to: torch.Tensor, via: torch.dtype, forms: Mapping[fx.Node, Form]
    ) -> fx.Node | None:
        """The node that a node or its base was cast from, if a cast back restores its values."""
        while True:
            outer = self.dialect.read(node)
            origin = example_of(outer.source) if isinstance(outer, Cast) else None
            if (
                isinstance(outer, Cast)
                and origin is not None
                and (origin.dtype, origin.device) == (to.dtype, to.device)
                and torch.promote_types(origin.dtype, via) == via
            ):
                return outer.source
            view = forms.get(node)
            if view is None or view.same_elements_as is None:
                return None
            node = view.same_elements_as

    def _is_undone(self, node: fx.Node, source: torch.dtype) -> bool:
        """True if all readers of a cast to a wider dtype cast it back."""
        here = example_of(node)
        return (
            here is not None
            and torch.promote_types(source, here.dtype) == here.dtype
            and bool(node.users)
            and all(
                isinstance(self.dialect.read(user), Cast)
                and (val := example_of(user)) is not None
                and (val.dtype, val.device) == (source, here.device)
                for user in node.users
            )
        )

    def _is_widened_addend(self, node: fx.Node) -> bool:
        """True if products are cast to a wider dtype only to be added up.

        Autocast adds the gradients of an activation in this way. Each of them was rounded to the
        narrower dtype, so their sum may be rounded to it too.
        """
        return (
            self.policy != "kept"
            and self._widens(node)
            and bool(node.users)
            and all(map(self._adds_widened, node.users))
        )

    def _widens(self, node: fx.Node) -> bool:
        """True if a node casts a value that contains a product to a wider dtype."""
        form, here = self.dialect.read(node), example_of(node)
        source = example_of(form.source) if isinstance(form, Cast) else None
        return (
            isinstance(form, Cast)
            and here is not None
            and source is not None
            and _CROSSED.issuperset([here.dtype, source.dtype])
            and source.dtype != here.dtype == torch.promote_types(source.dtype, here.dtype)
            and self.dialect.is_made_of_product(form.source)
        )

    def _adds_widened(self, node: fx.Node) -> bool:
        """True if a node adds up widened products alone."""
        form = self.dialect.read(node)
        return (
            form is not None
            and form.adds
            and not form.products
            and all(self._widens(term) or self._adds_widened(term) for term in form.sources)
        )
