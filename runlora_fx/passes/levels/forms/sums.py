"""Sums: terms that are added up, each times a number.

Example: ``addmm(b, x, w, alpha=2)`` is ``1 b' + 2 x w``: a broadcast and a product.

Invariant: each term has the shape of the sum, or the sum is not read.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from runlora_fx.passes.algebra.addends import Addends, scaled
from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar
from runlora_fx.passes.levels.cuts import Cut
from runlora_fx.passes.levels.forms.broadcasts import Broadcast, RepeatedRow
from runlora_fx.passes.levels.forms.convolutions import Convolution
from runlora_fx.passes.levels.forms.form import Cuts, Factors, Form, LinearNodes, Reading
from runlora_fx.passes.levels.forms.products import MatrixProduct
from runlora_fx.passes.levels.origins import Origin
from runlora_fx.passes.levels.sizes import Shape, same_shape, shape_of


@dataclass(frozen=True)
class WeightedSum(Form):
    """``sum(c * term)``."""

    terms: tuple[tuple[Broadcast | RepeatedRow | MatrixProduct | Convolution, float], ...]

    adds: ClassVar[bool] = True
    is_leaf_alone: ClassVar[bool] = True

    @staticmethod
    def of(
        *terms: tuple[fx.Node | Broadcast | RepeatedRow | MatrixProduct | Convolution, float],
    ) -> WeightedSum:
        """The sum of nodes, which broadcast where they are smaller, and of products."""
        return WeightedSum(
            tuple((Broadcast(x) if isinstance(x, fx.Node) else x, c) for x, c in terms)
        )

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """All that is added up, and what the products multiply."""
        return tuple(source for term, _ in self.terms for source in term.sources)

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The origins of all terms."""
        return tuple(origin for term, _ in self.terms for origin in term.origins)

    @property
    def products(self) -> tuple[Factors, ...]:
        """The terms that are products."""
        return tuple(product for term, _ in self.terms for product in term.products)

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """The cut of the first linear term, if all others broadcast to its shape."""
        cuts = (term.cut(node, linear) for term, _ in self.terms)
        cut = next((cut for cut in cuts if cut is not None), None)
        if cut is None:
            return None
        shape = shape_of(node)
        added = (term for term, _ in self.terms if isinstance(term, Broadcast))
        return cut if all(term.fits(shape, cut) for term in added) else None

    def is_vector(self, vectors: Collection[fx.Node]) -> bool:
        """True if it adds up vectors of one shape."""
        nodes = self.sources
        is_alike = all(same_shape(shape_of(node), shape_of(nodes[0])) for node in nodes)
        return not self.products and is_alike and all(node in vectors for node in nodes)

    def reads_as_computed(self, source: fx.Node, node: fx.Node, linear: Cuts) -> bool:
        """True if every term does."""
        return all(term.reads_as_computed(source, node, linear) for term, _ in self.terms)

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """The addends of all terms."""
        found: list[Polynomial] = []
        for term, c in self.terms:
            below = term.as_addends(shape, cut, reading)
            if below is None:
                return None
            found += scaled(below, Scalar(c))
        return tuple(found)
