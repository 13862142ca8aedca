"""Sums: addends put together, products accumulated where one kernel does both.

    W + s (B @ A)            ->      addmm(W, B, A, alpha=s)
    bias + X @ W'            ->      addmm(bias, X, W')
    residual + X @ W'        ->      add(residual, mm(X, W')), which fuses with what reads it

Invariant: the order of addends is fixed: rows and columns, leaves, products, the identity.
"""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.algebra.polynomials import IDENTITY, ONE, Normalised, Scalar
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.emit.broadcasts import NOTHING, Broadcasts, Lacks
from runlora_fx.passes.emit.products import Products
from runlora_fx.passes.emit.rules import rule_of
from runlora_fx.passes.emit.scope import Scope, dtype_of, flattened
from runlora_fx.passes.emit.values import Values
from runlora_fx.passes.emit.writer import EmissionError
from runlora_fx.passes.levels.forms import Identity
from runlora_fx.passes.levels.sizes import numel, same_shape, shape_of

_ORDER = {"vector": 0, "leaf": 1, "product": 2, "identity": 3}


class Sums:
    """Writes sums."""

    def __init__(
        self, scope: Scope, values: Values, products: Products, broadcasts: Broadcasts
    ) -> None:
        """Write in a scope, of values that are emitted when they are asked for."""
        self._scope = scope
        self._values = values
        self._products = products
        self._broadcasts = broadcasts
        self._lasting = set(scope.task.lasting)

    def accumulate(
        self, parts: list[Normalised], flip: bool, backward: bool, *, is_root: bool
    ) -> fx.Node:
        """The sum of parts, or its transpose.

        A product is accumulated onto a bias, and outside roots onto a leaf (the base weight), by
        one ``addmm``. A root's other addends stay plain additions: they fuse with its readers.
        """
        kinds = [self._kind(part, backward) for part in parts]
        # A leaf that is added to a diagonal part is a row or a column; it is added as a vector.
        makes_vector = any(part.core.is_diag_part for part in parts)
        total: fx.Node | None = None
        takes_product = False
        lacks = Lacks()
        for kind, part in sorted(zip(kinds, parts, strict=True), key=lambda kp: _ORDER[kp[0]]):
            scalar, transposed, core = part
            value, turned = self._scope.task.value(core, backward), transposed != flip
            if kind == "vector":
                vector = self._broadcasts.vector(part, flip, backward)
                takes_product = total is None and vector.scalar.is_one
                total = self.add(total, vector.node, vector.scalar)
                lacks = lacks.filled_by(vector)
                continue
            if kind == "identity":
                assert total is not None, "the identity is only ever added to something"
                total, lacks = self._broadcasts.filled(total, lacks), NOTHING
                total = self.add(total, self._identity_like(total), scalar)
                continue
            fused = kind == "product" and (total is None or takes_product)
            added = self._fused(total, value, turned, scalar) if fused else None
            if added is None:
                node = self._values.matrix(value, turned)
                if makes_vector:
                    node = self._scope.writer.reshape(node, (numel(shape_of(node)),))
                added = self.add(total, node, scalar)
            total = added
            takes_product = not is_root
            lacks = NOTHING
        assert total is not None
        return self._broadcasts.filled(total, lacks)

    def add(self, total: fx.Node | None, node: fx.Node, scalar: Scalar) -> fx.Node:
        """``total + scalar * node``."""
        if total is None:
            return self._scope.scaled(node, scalar)
        node = self._scope.scaled(node, scalar)
        if 1 < len(shape_of(total)) != len(shape_of(node)) > 1:
            total, node = (self._scope.writer.reshape(x, flattened(x)) for x in (total, node))
        return self._scope.writer.add(total, node)

    def _fused(
        self, total: fx.Node | None, value: Value, turned: bool, scalar: Scalar
    ) -> fx.Node | None:
        """``total + scalar * value`` in one kernel; None if the value must stand on its own."""
        step = self._products.unshared_product(value)
        if step is None:
            return None
        with self._scope.writer.making(rule_of(value, step, self._scope.leaves)):
            a, b, by = self._products.operands(value, step, turned)
            if total is None:
                return self._products.product(a, b, by * scalar)
        return self._add_product(total, a, b, by * scalar)

    def _add_product(self, total: fx.Node, a: fx.Node, b: fx.Node, scalar: Scalar) -> fx.Node:
        if scalar.leaves or len(shape_of(a)) != 2 or dtype_of(total) != dtype_of(a):
            return self.add(total, self._products.product(a, b, scalar), ONE)
        if all(map(self._lasts, (total, a, b))):
            kept = self._scope.writer.merged_weight(total, a, b, scalar.number)
            self._lasting.add(kept)
            return kept
        return self._scope.writer.addmm(total, a, b, scalar.number)

    def _lasts(self, node: fx.Node) -> bool:
        """Whether a node is the same tensor in every call, or a view of one."""
        while (form := self._scope.reader.forms.get(node)) is not None and form.is_view:
            (node,) = form.sources
        return node in self._lasting

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
        """The identity matrix of the graph that can be added to a square matrix."""
        shape, dtype = shape_of(total), dtype_of(total)
        for node, form in self._scope.reader.forms.items():
            fits = isinstance(form, Identity) and dtype_of(node) == dtype
            if fits and same_shape(shape_of(node), shape) and self._scope.writer.is_before(node):
                return node
        raise EmissionError(f"no identity matrix of shape {shape} stands before {total.name}")
