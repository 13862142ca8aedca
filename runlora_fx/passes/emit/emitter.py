"""Emission: from a plan to nodes.

The emitter decides nothing about the algebra: it obeys the plan. What is left to it is how a value
lies in memory. A value is computed in the orientation in which its largest leaf stands
untransposed, a root in its own: an activation computed transposed would drag transposed layouts
through whatever reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import fx

from runlora_fx.passes.algebra.plan import (
    Keep,
    Plan,
    Product,
    Step,
    Sum,
    Value,
    product_step,
    step_operands,
)
from runlora_fx.passes.algebra.polynomials import (
    IDENTITY,
    ONE,
    Factor,
    Normalised,
    Polynomial,
    Scalar,
    normalise,
    of_factors,
)
from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.emit.layout import is_relied_on, memory_order
from runlora_fx.passes.emit.orientation import orientations, stands_transposed
from runlora_fx.passes.emit.writer import EmissionError, Writer
from runlora_fx.passes.levels.forms import Identity
from runlora_fx.passes.levels.sizes import (
    equal,
    is_column_major,
    is_one,
    numel,
    same_shape,
    same_strides,
    shape_of,
    value_of,
)
from runlora_fx.passes.read.phases import Phases
from runlora_fx.passes.read.reader import GraphReader
from runlora_fx.passes.read.regions import Root


class _Operands(NamedTuple):
    """``scalar * (a @ b)``, not yet written."""

    a: fx.Node
    b: fx.Node
    scalar: Scalar


class _Vector(NamedTuple):
    """One row, or one column, that a matrix repeats; times a scalar."""

    node: fx.Node
    scalar: Scalar
    times: Dim
    is_row: bool


class _Lacks(NamedTuple):
    """What a sum of vectors still has to be repeated to, to be a matrix; None for a full side."""

    rows: Dim | None = None
    cols: Dim | None = None
    is_empty: bool = True

    def filled_by(self, vector: _Vector) -> _Lacks:
        """What it lacks once a vector is added to it: a row and a column fill each other."""
        is_row = vector.is_row
        if self.is_empty:
            return _Lacks(vector.times if is_row else None, None if is_row else vector.times, False)
        return _Lacks(self.rows if is_row else None, None if is_row else self.cols, False)


_NOTHING = _Lacks(is_empty=False)


class Emitter:
    """Emits the roots of a graph from one plan for all of them; every value is written once.

    Attributes:
        recomputed: Nodes of the forward that the backward computes again by itself.
        copied: By the copy of a root that has the strides it came with, the root as it was made.
    """

    def __init__(
        self,
        reader: GraphReader,
        phases: Phases,
        writer: Writer,
        plan: Plan,
        roots: Sequence[Root],
        existing: Mapping[tuple[Value, Step], tuple[fx.Node, bool]],
        came: Collection[tuple[Value, Step]],
        hint: Callable[[Dim], int],
        lasting: Collection[fx.Node] = (),
    ) -> None:
        """Prepare to emit; nothing is written yet.

        Args:
            reader: The linear algebra of the graph.
            phases: What of it is forward, what backward.
            writer: Where to write.
            plan: A step for every value that the roots need, in leaves of the graph.
            roots: All roots that are going to be emitted.
            existing: Nodes of the incoming graph that compute a value by a step, and whether they
                hold its transpose.
            came: Every step of the incoming graph.
            hint: The size of a symbolic dimension.
            lasting: Inputs that are the same tensors in every call, and of which merged weights are
                to be kept.
        """
        self._reader = reader
        self._leaves = reader.leaves
        self._phases = phases
        self._writer = writer
        self._steps = plan.steps
        self._existing = existing
        self._came = came
        self._hint = hint
        self._lasting = set(lasting)
        self._made: dict[Value, tuple[fx.Node, bool]] = {}
        self.recomputed: list[fx.Node] = []
        self.copied: dict[fx.Node, fx.Node] = {}
        self._of_values: set[fx.Node] = set()
        self._uses = self._count_uses(roots)
        self._orientations = orientations(plan.steps, roots, self._value)

    def emit(self, root: Root) -> fx.Node:
        """Write a root anew, in front of the node that holds it now.

        Raises:
            EmissionError: If the graph cannot express it.
        """
        self._writer.move_to(root.node)
        shape = shape_of(root.node)
        flip = is_column_major(root.node)
        parts = [addend for part in root.parts for addend in self._addends(part, root.backward)]
        whole = [part for part in parts if not flip and self._is_in_shape(part, root)]
        rest = [part for part in parts if part not in whole]
        result: fx.Node | None = None
        if rest:
            result = self._accumulate(rest, flip, root.backward, is_root=True)
            if flip:
                result = self._writer.transpose(result)
            result = self._writer.reshape(result, shape)
        for scalar, _, core in whole:
            assert core.leaf is not None
            node = self._leaf_node(core.leaf)
            result = self._add(result, node, scalar)
        assert result is not None
        result = self._writer.cast(result, _dtype_of(root.node))
        if result is root.node or not same_shape(shape_of(result), shape):
            raise EmissionError(f"{root.node.name} cannot be written in its shape {shape}")
        return self._in_layout(root, result)

    def _in_layout(self, root: Root, emitted: fx.Node) -> fx.Node:
        """An emitted root with the strides that it came with, as a copy if it has others."""
        if same_strides(emitted, root.node):
            return emitted
        order = memory_order(root.node, self._hint)
        if order is not None:
            copied = self._writer.laid_out(emitted, order)
            self.copied[copied] = emitted
            return copied
        if is_relied_on(root.node):
            raise EmissionError(f"{root.node.name} cannot be written with its strides")
        return emitted

    # -- roots ---------------------------------------------------------------------------------

    def _addends(self, part: Polynomial, backward: bool) -> list[Normalised]:
        """A part of a root; a sum that nothing else reads is added up with the other parts."""
        scalar, transposed, core = normalised = normalise(part)
        value = self._value(core, backward)
        step = self._steps.get(value)
        if not isinstance(step, Sum) or value in self._made or self._uses[value] != 1:
            return [normalised]
        addends = (p.T if transposed else p for p in step.parts)
        return [n for p in addends for n in self._addends(p.scaled(scalar), backward)]

    def _is_in_shape(self, part: Normalised, root: Root) -> bool:
        """Whether a part is a leaf that has the root's own shape: added there, for fusion."""
        factor = part.core.leaf
        if factor is None or factor.transposed != part.transposed:
            return False
        node = self._leaves.matrices[factor.leaf].node
        if node is None or not same_shape(shape_of(node), shape_of(root.node)):
            return False
        leaf = self._leaves.matrices[factor.leaf]
        extents = self._reader.cuts[root.node].extents(shape_of(root.node))
        return same_shape((leaf.batch, leaf.rows, leaf.cols), extents)

    # -- sums ----------------------------------------------------------------------------------

    def _accumulate(
        self, parts: list[Normalised], flip: bool, backward: bool, *, is_root: bool
    ) -> fx.Node:
        """The sum of parts, or its transpose.

        A product is accumulated onto a bias, and outside roots onto a leaf (the base weight), by
        one ``addmm``. A root's other addends stay plain additions: they fuse with its readers.
        """
        order = {"vector": 0, "leaf": 1, "product": 2, "identity": 3}
        kinds = [self._kind(part, backward) for part in parts]
        total: fx.Node | None = None
        takes_product = False
        lacks = _Lacks()
        for kind, part in sorted(zip(kinds, parts, strict=True), key=lambda kp: order[kp[0]]):
            scalar, transposed, core = part
            value, turned = self._value(core, backward), transposed != flip
            if kind == "vector":
                vector = self._vector_to_repeat(part, flip, backward)
                takes_product = total is None and vector.scalar.is_one
                total = self._add(total, vector.node, vector.scalar)
                lacks = lacks.filled_by(vector)
                continue
            if kind == "identity":
                assert total is not None, "the identity is only ever added to something"
                total, lacks = self._filled(total, lacks), _NOTHING
                total = self._add(total, self._identity_like(total), scalar)
                continue
            fused = kind == "product" and (total is None or takes_product)
            operands = self._operands_if_unshared(value, turned) if fused else None
            if operands is None:
                total = self._add(total, self._matrix(value, turned, prefer=turned), scalar)
            else:
                a, b, by = operands
                total = self._add_product(total, a, b, by * scalar)
            takes_product = not is_root
            lacks = _NOTHING
        assert total is not None
        return self._filled(total, lacks)

    def _add_product(
        self, total: fx.Node | None, a: fx.Node, b: fx.Node, scalar: Scalar
    ) -> fx.Node:
        if total is None:
            return self._product(a, b, scalar)
        if scalar.leaves or len(shape_of(a)) != 2 or _dtype_of(total) != _dtype_of(a):
            return self._add(total, self._product(a, b, scalar), ONE)
        if all(map(self._lasts, (total, a, b))):
            kept = self._writer.merged(total, a, b, scalar.number)
            self._lasting.add(kept)
            return kept
        return self._writer.addmm(total, a, b, scalar.number)

    def _lasts(self, node: fx.Node) -> bool:
        """Whether a node is the same tensor in every call, or a view of one."""
        while (form := self._reader.forms.get(node)) is not None and form.is_view:
            (node,) = form.sources
        return node in self._lasting

    def _kind(self, part: Normalised, backward: bool) -> str:
        if part.core.leaf is not None:
            return "leaf"
        if part.core == IDENTITY:
            return "identity"
        if part.core.is_dots:
            return "product"
        return (
            "product"
            if self._broadcast_step(self._value(part.core, backward)) is None
            else "vector"
        )

    def _identity_like(self, total: fx.Node) -> fx.Node:
        """The identity matrix of the graph that can be added to a square matrix."""
        shape, dtype = shape_of(total), _dtype_of(total)
        for node, form in self._reader.forms.items():
            fits = isinstance(form, Identity) and _dtype_of(node) == dtype
            if fits and same_shape(shape_of(node), shape) and self._writer.is_before(node):
                return node
        raise EmissionError(f"no identity matrix of shape {shape} stands before {total.name}")

    def _vector_to_repeat(self, part: Normalised, flip: bool, backward: bool) -> _Vector:
        """The row that a broadcast part repeats, or the column, as it is laid in the result."""
        step = self._broadcast_step(self._value(part.core, backward))
        assert step is not None
        turned = part.transposed != flip
        left, right = (step.right.T, step.left.T) if turned else (step.left, step.right)
        is_row = self._ones_side(left, right) == "left"
        ones, vector = (left, right) if is_row else (right, left)
        (by, _, bare), (c, transposed, core) = normalise(ones), normalise(vector)
        times = self._leaves.matrices[bare.terms[0][0].factors[0].leaf].rows
        is_as_it_is = is_row and core.leaf is not None and core.leaf.transposed == transposed
        if is_as_it_is and core.leaf is not None and not self._is_ones(core.leaf):
            node = self._leaf_node(core.leaf)
        else:
            node = self._matrix(self._value(core, backward), transposed)
        return _Vector(node, part.scalar * by * c, times, is_row)

    def _filled(self, total: fx.Node, lacks: _Lacks) -> fx.Node:
        """A sum of vectors, repeated to the matrix that it is."""
        if lacks.rows is not None:
            return self._writer.repeat(total, lacks.rows, rows=True)
        return total if lacks.cols is None else self._writer.repeat(total, lacks.cols, rows=False)

    def _broadcast_step(self, value: Value) -> Product | None:
        """The step by which a value repeats a row or a column; None if it does not."""
        step, core = self._steps.get(value), value.core
        if core.is_dots:
            return None
        if step is None and len(core) == 1 and len(core.words[0].factors) == 2:
            first, last = core.words[0].factors
            step = product_step(of_factors((first,)), of_factors((last,)))
            step = Product(step.left, step.right.scaled(Scalar(1.0, core.words[0].scalars)))
        if not isinstance(step, Product) or self._ones_side(step.left, step.right) is None:
            return None
        return step

    def _ones_side(self, left: Polynomial, right: Polynomial) -> Literal["left", "right"] | None:
        """Which operand is the column of ones that repeats a row, or the row of ones."""
        first, last = left.leaf, right.leaf
        if first is not None and not first.transposed and self._is_ones(first):
            return "left"
        if last is not None and last.transposed and self._is_ones(last):
            return "right"
        return None

    def _totalled(self, value: Value, step: Product, transposed: bool) -> fx.Node:
        """A product with the row of ones on the left, or the column on the right: a sum."""
        left, right = (step.right.T, step.left.T) if transposed else (step.left, step.right)
        rows = self._ones_side(left.T, right.T) == "left"
        ones, summed = (left, right) if rows else (right, left)
        node, scalar = self._operand(summed, value.backward)
        return self._scaled(self._writer.total(node, rows=rows), scalar * normalise(ones).scalar)

    def _add(self, total: fx.Node | None, node: fx.Node, scalar: Scalar) -> fx.Node:
        if total is None:
            return self._scaled(node, scalar)
        node = self._scaled(node, scalar)
        if 1 < len(shape_of(total)) != len(shape_of(node)) > 1:
            total, node = (self._writer.reshape(x, _flattened(x)) for x in (total, node))
        return self._writer.add(total, node)

    # -- values --------------------------------------------------------------------------------

    def _matrix(self, value: Value, transposed: bool, prefer: bool | None = None) -> fx.Node:
        """A value or its transpose as a matrix; ``prefer`` says how to compute it if it is new."""
        node, lies = self._as_made(value, prefer)
        if lies == transposed:
            return node
        if value.core.leaf is not None and len(shape_of(node)) > 2:
            node = self._flat(value.core.leaf.leaf, node)
        return self._writer.transpose(node)

    def _as_made(self, value: Value, prefer: bool | None = None) -> tuple[fx.Node, bool]:
        """The node that holds a value, and whether it holds its transpose."""
        if value not in self._made:
            turned = self._orientations.get(value, prefer)
            if turned is None:
                turned = stands_transposed(value.core, self._size)
            self._made[value] = self._make(value, turned)
        return self._made[value]

    def _size(self, factor: Factor) -> int:
        leaf = self._leaves.matrices[factor.leaf]
        return self._hint(leaf.rows) * self._hint(leaf.cols)

    def _make(self, value: Value, transposed: bool) -> tuple[fx.Node, bool]:
        if value.core.leaf is not None:
            return self._leaf(value.core.leaf), False
        step, twin = self._steps.get(value), Value(value.core, False)
        if step is None or isinstance(step, Keep):
            if not value.backward:
                raise EmissionError(f"the plan has no step for {value}")
            self._matrix(twin, transposed)
            return self._made[twin]
        if not isinstance(step, Product | Sum):
            raise EmissionError(f"nothing writes the step {step}")
        if value.backward and twin in self._made and self._steps.get(twin) == step:
            return self._made[twin]
        again = self._steps.get(Value(value.core, True)) if not value.backward else None
        known = self._existing.get((value, step))
        if (
            known is not None
            and self._writer.is_before(known[0])
            and _dtype_of(known[0]) == self._dtype(value)
            and self._came_so(value, step)
        ):
            if isinstance(again, Product | Sum):
                self.recomputed.append(known[0])
            seen = self._reader.cuts[known[0]].extents(shape_of(known[0]))
            return self._writer.reshape(known[0], _matrix_shape(*seen)), known[1]
        begin = len(self._writer.written)
        if isinstance(step, Sum):
            parts = [normalise(part) for part in step.parts]
            node = self._accumulate(parts, transposed, value.backward, is_root=False)
            node = self._writer.cast(node, self._dtype(value))
        elif value.core.is_dots:
            node = self._dots(value, step)
        elif step.left.is_diagonal or step.right.is_diagonal:
            node = self._stretched(value, step, transposed)
        elif self._broadcast_step(value) is not None:
            part = Normalised(ONE, False, value.core)
            vector = self._vector_to_repeat(part, transposed, value.backward)
            lacks = _Lacks().filled_by(vector)
            node = self._scaled(self._filled(vector.node, lacks), vector.scalar)
        elif self._ones_side(step.left.T, step.right.T) is not None:
            node = self._totalled(value, step, transposed)
        else:
            node = self._product(*self._operands(value, step, transposed))
        # Not the value alone, but all it is made by: the partitioner would save the last of them.
        own = [n for n in self._writer.written[begin:] if n not in self._of_values]
        self._of_values.update(own)
        if isinstance(again, Product | Sum):
            self.recomputed += [node, *own]
        return node, transposed

    def _came_so(self, value: Value, step: Step) -> bool:
        """Whether the incoming graph makes all that a step reads as the plan does.

        Otherwise the node that takes the step there would drag along another way to its operands.
        """
        for p in step_operands(step):
            below = self._value(normalise(p).core, value.backward)
            planned = self._steps.get(below)
            if isinstance(planned, Keep):
                below = Value(below.core, False)
                planned = self._steps.get(below)
            if planned is not None and not (
                (below, planned) in self._came and self._came_so(below, planned)
            ):
                return False
        return True

    def _operands(self, value: Value, step: Product, transposed: bool) -> _Operands:
        left, right = (step.right.T, step.left.T) if transposed else (step.left, step.right)
        a, by_a = self._operand(left, value.backward)
        b, by_b = self._operand(right, value.backward)
        dtype = self._dtype(value)
        return _Operands(self._writer.cast(a, dtype), self._writer.cast(b, dtype), by_a * by_b)

    def _dots(self, value: Value, step: Product) -> fx.Node:
        """The diagonal of a product: dots of rows or of columns, as the left operand lies."""
        _, transposed, core = normalise(step.left)
        _, lies = self._as_made(self._value(core, value.backward))
        rows = lies == transposed
        left, right = (step.left, step.right.T) if rows else (step.left.T, step.right)
        a, by_a = self._operand(left, value.backward)
        b, by_b = self._operand(right, value.backward)
        dtype = self._dtype(value)
        node = self._writer.dots(
            self._writer.cast(a, dtype), self._writer.cast(b, dtype), rows=rows
        )
        return self._scaled(node, by_a * by_b)

    def _stretched(self, value: Value, step: Product, transposed: bool) -> fx.Node:
        """A product with a diagonal matrix: rows or columns scaled by its vector."""
        left, right = (step.right.T, step.left.T) if transposed else (step.left, step.right)
        diagonal, scaled = (left, right) if left.is_diagonal else (right, left)
        # Scaling is elementwise: its result lies in memory as its operand does.
        scalar, turned, core = normalise(scaled)
        node = self._matrix(self._value(core, value.backward), turned, prefer=turned)
        vector, by = self._vector(diagonal)
        size = numel(shape_of(vector))
        shape = (*shape_of(node)[:-1], 1) if left is diagonal else (size,)
        vector = self._writer.reshape(vector, shape)
        stretched = self._writer.stretch(node, vector, rows=left is diagonal)
        return self._scaled(stretched, scalar * by)

    def _vector(self, diagonal: Polynomial) -> tuple[fx.Node, Scalar]:
        """The vector of a diagonal matrix: a leaf, or a leaf ``g`` in ``c (I + a diag(g))``."""
        by, _, core = normalise(diagonal)
        vector, shift = None, 0.0
        for word, c in core.terms:
            if word.factors and not word.scalars and vector is None and len(word.factors) == 1:
                vector = self._writer.scale(self._leaf_node(word.factors[0]), c)
            elif not word.factors and not word.scalars:
                shift = c
            else:
                raise EmissionError("a plan makes a diagonal matrix of several vectors")
        assert vector is not None, "the identity is no step"
        return self._writer.shift(vector, shift), by

    def _operands_if_unshared(self, value: Value, transposed: bool) -> _Operands | None:
        """The operands of a product that nothing else reads; None if it must stand on its own."""
        step = self._steps.get(value)
        if value in self._made or self._uses[value] != 1 or not isinstance(step, Product):
            return None
        if value.core.is_dots:
            return None
        if step.left.is_diagonal or step.right.is_diagonal:
            return None
        if self._ones_side(step.left.T, step.right.T) is not None:
            return None
        batch = self._leaves.matrices[value.core.shown[0].leaf].batched
        return None if batch else self._operands(value, step, transposed)

    def _operand(self, p: Polynomial, backward: bool) -> tuple[fx.Node, Scalar]:
        scalar, transposed, core = normalise(p)
        return self._matrix(self._value(core, backward), transposed), scalar

    def _product(self, a: fx.Node, b: fx.Node, scalar: Scalar) -> fx.Node:
        """``scalar * (a @ b)``, scaled where it costs least: at the smallest of the three."""
        out = (*shape_of(a)[:-1], shape_of(b)[-1])
        sizes = [self._hint(numel(shape)) for shape in (out, shape_of(a), shape_of(b))]
        if scalar is ONE or scalar.is_one or sizes[0] == min(sizes):
            return self._scaled(self._writer.matmul(a, b), scalar)
        if sizes[1] <= sizes[2]:
            return self._writer.matmul(self._scaled(a, scalar), b)
        return self._writer.matmul(a, self._scaled(b, scalar))

    def _scaled(self, node: fx.Node, scalar: Scalar) -> fx.Node:
        node = self._writer.scale(node, scalar.number)
        for i in scalar.leaves:
            by, inverse = self._leaves.scalars[i]
            if value_of(by) is not None:
                by = self._writer.reshape(by, ())
            node = self._writer.divide(node, by) if inverse else self._writer.scale(node, by)
        return node

    def _dtype(self, value: Value) -> torch.dtype:
        """The dtype that a value is computed in: the narrowest of its leaves'.

        They differ only where casts are crossed. A product of fp32 adapters is computed in fp32,
        and rounded once when it is added to a bf16 weight.
        """
        origins = (self._leaves.matrices[i].origin for i in sorted(value.core.leaves))
        dtypes = [origin.dtype for origin in origins if origin.dtype is not None]
        return min(dtypes or [self._writer.dtype], key=lambda dtype: dtype.itemsize)

    def _value(self, core: Polynomial, backward: bool) -> Value:
        nodes = (node for i in core.leaves for node in self._leaves.matrices[i].sources)
        return Value(core, backward or any(node in self._phases.tangent for node in nodes))

    # -- leaves --------------------------------------------------------------------------------

    def _is_ones(self, factor: Factor) -> bool:
        return self._leaves.matrices[factor.leaf].is_ones

    def _leaf_node(self, factor: Factor) -> fx.Node:
        return self._writer.leaf(self._leaves.matrices[factor.leaf].origin)

    def _leaf(self, factor: Factor) -> fx.Node:
        leaf, node = self._leaves.matrices[factor.leaf], self._leaf_node(factor)
        as_it_is = (
            not self._writer.flattens
            and len(shape_of(node)) > 1
            and equal(shape_of(node)[-1], leaf.cols)
        )
        if not as_it_is or factor.transposed or leaf.batched:
            node = self._flat(factor.leaf, node)
        return self._writer.transpose(node) if factor.transposed else node

    def _flat(self, leaf: int, node: fx.Node) -> fx.Node:
        spec = self._leaves.matrices[leaf]
        return self._writer.reshape(node, _matrix_shape(spec.batch, spec.rows, spec.cols))

    def _count_uses(self, roots: Iterable[Root]) -> Counter[Value]:
        """How often each value is read, by steps of either phase and by roots."""
        uses: Counter[Value] = Counter()
        for root in roots:
            uses.update(self._value(normalise(p).core, root.backward) for p in root.parts)
        for value, step in self._steps.items():
            match step:
                case Keep():
                    uses[Value(value.core, False)] += 1
                case _:
                    operands = (normalise(p).core for p in step_operands(step))
                    uses.update(self._value(core, value.backward) for core in operands)
        return uses


def _dtype_of(node: fx.Node) -> torch.dtype:
    val = value_of(node)
    assert val is not None
    return val.dtype


def _matrix_shape(batch: Dim, rows: Dim, cols: Dim) -> tuple[Dim, ...]:
    return (rows, cols) if is_one(batch) else (batch, rows, cols)


def _flattened(node: fx.Node) -> tuple[Dim, ...]:
    shape = shape_of(node)
    return (numel(shape[:-1]), shape[-1])
