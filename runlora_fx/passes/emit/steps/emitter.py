"""Emission: from a plan to nodes.

    Y = X (W + 2 B A)'       ->      addmm(w, b, a, alpha=2), permute, mm

The emitter follows the plan. The plan also says which values are stored transposed
(:mod:`runlora_fx.passes.algebra.orientation`).

Invariant: every value is written once, in front of the first root that needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from weakref import proxy

from torch import fx

import runlora_fx.passes.emit.steps.implementations  # noqa: F401  what it registers writes the steps
from runlora_fx.passes.algebra.polynomials import Normalised, Polynomial, Scalar, normalise
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Keep, Step, Sum
from runlora_fx.passes.algebra.words import Factor
from runlora_fx.passes.emit.nodes.layout import is_relied_on, memory_order
from runlora_fx.passes.emit.nodes.node_writer import EmissionError
from runlora_fx.passes.emit.nodes.rules import COPY, rule_of, rule_of_root
from runlora_fx.passes.emit.nodes.writer import Writer
from runlora_fx.passes.emit.steps.broadcasts import Broadcasts
from runlora_fx.passes.emit.steps.products import Products
from runlora_fx.passes.emit.steps.registry import Emission, writing
from runlora_fx.passes.emit.steps.scope import Scope, dtype_of, matrix_shape
from runlora_fx.passes.emit.steps.sums import Sums
from runlora_fx.passes.emit.steps.task import Laid, Task
from runlora_fx.passes.levels.sizes import is_column_major, same_shape, same_strides, shape_of
from runlora_fx.passes.read.regions import Root


@dataclass(frozen=True)
class Emitted:
    """A root that was written.

    Attributes:
        node: The node that holds it.
        written: All nodes that were written for it, in order.
        recomputed: Nodes of the forward whose value the plan makes again in the backward.
        copied: If the root was copied to restore its strides: the copy, and the node it copies.
        values: The values that were made for it, and the nodes that hold them.
        met: By product of the incoming graph that could be reused, True if it stands before the
            root.
    """

    node: fx.Node
    written: tuple[fx.Node, ...]
    recomputed: tuple[fx.Node, ...]
    copied: tuple[tuple[fx.Node, fx.Node], ...]
    values: tuple[tuple[Value, Laid], ...]
    met: Mapping[fx.Node, bool]

    @property
    def held(self) -> Iterable[fx.Node]:
        """The nodes that the other attributes name, apart from ``written`` and ``met``."""
        copied = (node for both in self.copied for node in both)
        return (self.node, *self.recomputed, *copied, *[laid.node for _, laid in self.values])

    def on(self, nodes: Mapping[fx.Node, fx.Node]) -> Emitted:
        """The same for a copy of the root; only what ``apply`` reads is kept."""
        return Emitted(
            nodes[self.node],
            tuple([nodes[node] for node in self.written]),
            tuple([nodes[node] for node in self.recomputed]),
            tuple([(nodes[copy], nodes[made]) for copy, made in self.copied]),
            (),
            {},
        )


class Emitter:
    """Emits the roots of one graph. Values that several roots need are written once."""

    def __init__(self, task: Task, writer: Writer) -> None:
        """Prepare to emit a task by a writer."""
        self._scope = Scope(task, writer)
        self._task = task
        # A weak reference, because Python frees cycles of references only in a garbage collection.
        values = proxy(self)
        products, broadcasts = Products(self._scope, values), Broadcasts(self._scope, values)
        self._sums = Sums(self._scope, values, products, broadcasts)
        self._emission = Emission(self._scope, values, products, self._sums, broadcasts)
        self._made: dict[Value, Laid] = {}
        self._leaves: dict[tuple[int, bool], fx.Node] = {}
        self._of_values: set[fx.Node] = set()
        self._start()

    def _start(self) -> None:
        """Forget what was noted for the last root."""
        self._recomputed: list[fx.Node] = []
        self._copied: list[tuple[fx.Node, fx.Node]] = []
        self._values: list[tuple[Value, Laid]] = []
        self._met: dict[fx.Node, bool] = {}

    def emit(self, root: Root) -> Emitted:
        """Write a root, in front of the node that holds it now.

        Raises:
            EmissionError: If the plan cannot be expressed in this graph.
        """
        writer = self._scope.writer
        writer.move_to(root.node)
        self._start()
        begin = len(writer.written)
        with writer.making(rule_of_root(root)):
            node = self._emitted(root)
        noted = (tuple(self._recomputed), tuple(self._copied), tuple(self._values), self._met)
        return Emitted(node, tuple(writer.written[begin:]), *noted)

    def _emitted(self, root: Root) -> fx.Node:
        shape = shape_of(root.node)
        flip = is_column_major(root.node)
        parts = [addend for part in root.parts for addend in self._addends(part, root.backward)]
        whole = [part for part in parts if not flip and self._is_in_shape(part, root)]
        rest = [part for part in parts if part not in whole]
        result: fx.Node | None = None
        if rest:
            result = self._sums.added_up(rest, flip, root.backward)
            if flip:
                result = self._scope.writer.transpose(result)
            result = self._scope.writer.reshape(result, shape)
        for scalar, _, core in whole:
            assert core.leaf is not None
            node = self._scope.leaf_node(core.leaf)
            result = self._scope.added(result, self._scope.scaled(node, scalar))
        assert result is not None
        result = self._scope.writer.cast(result, dtype_of(root.node))
        if result is root.node or not same_shape(shape_of(result), shape):
            raise EmissionError(f"{root.node.name} cannot be written in its shape {shape}")
        return self._in_layout(root, result)

    def _in_layout(self, root: Root, emitted: fx.Node) -> fx.Node:
        """An emitted root, copied if its strides are not those that the root came with.

        Raises:
            EmissionError: If a reader relies on strides that no copy can have.
        """
        if same_strides(emitted, root.node):
            return emitted
        order = memory_order(root.node, self._scope.hint)
        if order is not None:
            with self._scope.writer.making(COPY):
                copied = self._scope.writer.laid_out(emitted, order)
            self._copied.append((copied, emitted))
            return copied
        if is_relied_on(root.node):
            raise EmissionError(f"{root.node.name} cannot be written with its strides")
        return emitted

    def _addends(self, part: Polynomial, backward: bool) -> list[Normalised]:
        """A part of a root as addends; a sum that only the root reads is split into its addends."""
        scalar, transposed, core = normalised = normalise(part)
        value = self._task.value(core, backward)
        step = self._task.steps.get(value)
        if not isinstance(step, Sum) or value in self._made or self._task.uses[value] != 1:
            return [normalised]
        addends = (p.T if transposed else p for p in step.parts)
        return [n for p in addends for n in self._addends(p.scaled(scalar), backward)]

    def _is_in_shape(self, part: Normalised, root: Root) -> bool:
        """True if a part is a leaf of the root's own shape. It is added last, without a reshape."""
        factor = part.core.leaf
        if factor is None or factor.transposed != part.transposed:
            return False
        node = self._scope.leaves.matrices[factor.leaf].node
        if node is None or not same_shape(shape_of(node), shape_of(root.node)):
            return False
        leaf = self._scope.leaves.matrices[factor.leaf]
        extents = self._scope.reader.cuts[root.node].extents(shape_of(root.node))
        return same_shape((leaf.batch, leaf.rows, leaf.cols), extents)

    # -- values --------------------------------------------------------------------------------

    def matrix(self, value: Value, transposed: bool) -> fx.Node:
        """A value or its transpose as a matrix."""
        node, lies = self._laid(value, transposed)
        # A vector has no transpose, and images are the nodes of both matrices.
        has_transpose = not value.core.is_diag_part and not self._scope.are_images(value.core)
        if lies == transposed or not has_transpose:
            return node
        return self._scope.writer.transpose(self._scope.plain(value.core, node))

    def operand(self, p: Polynomial, backward: bool) -> tuple[fx.Node, Scalar]:
        """A polynomial as a matrix, and the scalar that it is still to be multiplied by."""
        scalar, transposed, core = normalise(p)
        return self.matrix(self._task.value(core, backward), transposed), scalar

    def laid(self, value: Value) -> Laid:
        """The node that holds a value or its transpose, emitted if it is new."""
        return self._laid(value, False)

    def _laid(self, value: Value, transposed: bool) -> Laid:
        """The same; a value whose orientation the plan leaves open is made as it is asked for."""
        factor = value.core.leaf
        if factor is not None and value not in self._task.steps:
            return Laid(self._shown(factor, value.backward), False)
        if value not in self._made:
            laid = self._make(value, self._task.lies.get(value.core, transposed))
            self._made[value] = laid
            self._values.append((value, laid))
        return self._made[value]

    def know(self, value: Value, laid: Laid) -> None:
        """Take note that a node holds a value."""
        self._made[value] = laid

    def _shown(self, factor: Factor, backward: bool) -> fx.Node:
        """A leaf as a matrix; each is reshaped once in each phase."""
        key = (factor.leaf, backward)
        if key not in self._leaves:
            self._leaves[key] = self._scope.leaf(factor)
        return self._leaves[key]

    def is_made(self, value: Value) -> bool:
        """True if a value was emitted already."""
        return value in self._made

    def _make(self, value: Value, transposed: bool) -> Laid:
        step, twin = self._task.steps.get(value), Value(value.core, False)
        if step is None or isinstance(step, Keep):
            if not value.backward:
                raise EmissionError(f"the plan has no step for {value}")
            self.matrix(twin, transposed)
            return self._made[twin]
        if value.backward and twin in self._made and self._task.is_alike(value, twin):
            return self._made[twin]
        again = self._task.steps.get(Value(value.core, True), Keep())
        is_repeated = not value.backward and not isinstance(again, Keep)
        known = self._came(value, step)
        if known is not None:
            if is_repeated:
                self._recomputed.append(known.node)
            if self._scope.are_images(value.core):
                return known
            seen = self._scope.reader.cuts[known.node].extents(shape_of(known.node))
            return Laid(
                self._scope.writer.reshape(known.node, matrix_shape(*seen)), known.transposed
            )
        begin = len(self._scope.writer.written)
        with self._scope.writer.making(rule_of(value, step, self._scope.leaves)):
            write = writing(self._task.implementations[value])
            node = write(self._emission, value, step, transposed)
        # All nodes of the value get the recompute tag. The partitioner saves the last untagged one.
        own = [n for n in self._scope.writer.written[begin:] if n not in self._of_values]
        self._of_values.update(own)
        if is_repeated:
            self._recomputed += [node, *own]
        return Laid(node, transposed)

    def _came(self, value: Value, step: Step) -> Laid | None:
        """The node of the incoming graph that computes a value by the same step, if usable."""
        known = self._task.existing.get((value, step))
        if known is None:
            return None
        laid, writer = known, self._scope.writer
        is_before = self._met[laid.node] = writer.is_before(laid.node)
        is_alike = (
            is_before
            and self._task.runs_as_usual(value)
            and dtype_of(laid.node) == self._scope.dtype(value)
            and self._task.came_so(value, step)
        )
        return laid if is_alike else None
