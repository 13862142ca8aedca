"""Sums: the addends of a value are added up.

    residual + X W'        ->      add(residual, mm(x, w')), which Inductor fuses with its reader
    1 b' + X W'            ->      addmm(b, x, w')

Invariant: the order of addends is fixed: repeated vectors, leaves, products, the identity.
"""

from __future__ import annotations

from functools import reduce

from torch import fx

from runlora_fx.passes.algebra.polynomials import IDENTITY, Normalised
from runlora_fx.passes.emit.nodes.node_writer import EmissionError
from runlora_fx.passes.emit.nodes.rules import rule_of
from runlora_fx.passes.emit.steps.broadcasts import NOTHING, Broadcasts, Lacks
from runlora_fx.passes.emit.steps.products import Operands, Products
from runlora_fx.passes.emit.steps.scope import Scope, dtype_of
from runlora_fx.passes.emit.steps.values import Values
from runlora_fx.passes.levels.forms import Identity
from runlora_fx.passes.levels.sizes import numel, same_shape, shape_of

_ORDER = {"vector": 0, "leaf": 1, "product": 2, "identity": 3}


class Sums:
    """Writes sums."""

    def __init__(
        self, scope: Scope, values: Values, products: Products, broadcasts: Broadcasts
    ) -> None:
        """Write in a scope. Operands are emitted when they are first asked for."""
        self._scope = scope
        self._values = values
        self._products = products
        self._broadcasts = broadcasts

    def added_up(self, parts: list[Normalised], flip: bool, backward: bool) -> fx.Node:
        """The sum of addends, or its transpose.

        A product is added to a single bias by ``addmm``. All other additions are plain ``add``
        calls, which Inductor fuses with the reader of the sum.

        Args:
            parts: The addends.
            flip: True to write the transpose.
            backward: The phase that the sum is computed in.
        """
        if any(self._scope.are_images(part.core) for part in parts):
            return self._images(parts, backward)
        kinds = [self._kind(part, backward) for part in parts]
        # A sum with diagonal parts is a vector. A leaf in it may be held as a row or a column.
        makes_vector = any(part.core.is_diag_part for part in parts)
        total: fx.Node | None = None
        takes_product = False
        lacks = Lacks()
        for kind, part in sorted(zip(kinds, parts, strict=True), key=lambda kp: _ORDER[kp[0]]):
            if kind == "vector":
                vector = self._broadcasts.vector(part, flip, backward)
                takes_product = total is None and vector.scalar.is_one
                total = self._scope.added(total, self._scope.scaled(*vector[:2]))
                lacks = lacks.filled_by(vector)
                continue
            if kind == "identity":
                assert total is not None, "the identity is only ever added to something"
                total = self._broadcasts.filled(total, lacks)
                node = self._scope.scaled(self._identity_like(total), part.scalar)
                total = self._scope.added(total, node)
            elif total is not None and takes_product:
                total = self._with(total, part, flip, backward)
            else:
                node = self._matrix(part, flip, backward)
                if makes_vector:
                    node = self._scope.writer.reshape(node, (numel(shape_of(node)),))
                total = self._scope.added(total, node)
            takes_product, lacks = False, NOTHING
        assert total is not None
        return self._broadcasts.filled(total, lacks)

    def _images(self, parts: list[Normalised], backward: bool) -> fx.Node:
        """The sum of images, and of vectors with an entry for each channel."""
        vectors = [part for part in parts if self._kind(part, backward) == "vector"]
        images = [self._matrix(part, False, backward) for part in parts if part not in vectors]
        total = reduce(self._scope.writer.add, images)
        for part in vectors:
            vector = self._broadcasts.vector(part, False, backward)
            node = self._scope.scaled(vector.node, vector.scalar)
            total = self._scope.writer.add_to_channels(total, node)
        return total

    def addend(self, part: Normalised, flip: bool, backward: bool) -> fx.Node:
        """The addend that ``addmm`` adds a product to: a vector to broadcast, or a matrix."""
        if self._kind(part, backward) == "vector":
            return self._scope.scaled(*self._broadcasts.vector(part, flip, backward)[:2])
        return self._matrix(part, flip, backward)

    def _matrix(self, part: Normalised, flip: bool, backward: bool) -> fx.Node:
        """An addend as a matrix.

        If it is a product, its smallest operand or its result is scaled, and not the sum's addend.
        Inductor may run the addition and another product as one call. That call reads this addend
        from memory, so scaling it there would be one more kernel.
        """
        value, turned = self._scope.task.value(part.core, backward), part.transposed != flip
        step = self._products.unshared_product(value)
        if step is None:
            return self._scope.scaled(self._values.matrix(value, turned), part.scalar)
        with self._scope.writer.making(rule_of(value, step, self._scope.leaves)):
            a, b, by = self._products.operands(value, step, turned)
            return self._products.product(a, b, by * part.scalar)

    def _with(self, total: fx.Node, part: Normalised, flip: bool, backward: bool) -> fx.Node:
        """``total + part``; one ``addmm`` if the addend is a product with one reader."""
        value, turned = self._scope.task.value(part.core, backward), part.transposed != flip
        step = self._products.unshared_product(value)
        if step is None:
            return self._scope.added(total, self._matrix(part, flip, backward))
        with self._scope.writer.making(rule_of(value, step, self._scope.leaves)):
            a, b, by = self._products.operands(value, step, turned)
        return self._products.accumulated(total, Operands(a, b, by * part.scalar))

    def _kind(self, part: Normalised, backward: bool) -> str:
        if part.core.leaf is not None:
            return "leaf"
        if part.core == IDENTITY:
            return "identity"
        if part.core.is_diag_part:
            return "product"
        return (
            "product"
            if self._broadcasts.step(self._scope.task.value(part.core, backward)) is None
            else "vector"
        )

    def _identity_like(self, total: fx.Node) -> fx.Node:
        """An identity matrix of the graph with the shape and dtype of a square matrix.

        Raises:
            EmissionError: If none stands before the anchor.
        """
        shape, dtype = shape_of(total), dtype_of(total)
        for node, form in self._scope.reader.forms.items():
            fits = isinstance(form, Identity) and dtype_of(node) == dtype
            if fits and same_shape(shape_of(node), shape) and self._scope.writer.is_before(node):
                return node
        raise EmissionError(f"no identity matrix of shape {shape} stands before {total.name}")
