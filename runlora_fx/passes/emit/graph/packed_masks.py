"""Packed masks: the forward saves dropout masks as bits, eight elements to a byte.

    mask = rand(...) > p;  dX = mask * g       ->      bits = pack(mask);  dX = unpack(bits) * g

torch saves a mask as a byte for each element. The first dimension of a mask that 8 divides is split
into eight parts, and the i-th bit of a byte is an element of the i-th part:

    bits[j, k] = sum of 2^i mask[i n + j, k] over i, where n is the size / 8

So a kernel reads and writes elements next to each other.

Invariant: ``unpack(pack(mask))`` equals ``mask``, and only the backward reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from runlora_fx.passes.emit.graph.recompute import keep, leave_open, recompute
from runlora_fx.passes.emit.nodes.inserter import Inserter
from runlora_fx.passes.emit.proof.packing import check_packing
from runlora_fx.passes.emit.proof.verify import VerificationError
from runlora_fx.passes.levels.operators import CASTS, VIEWS, is_pointwise
from runlora_fx.passes.levels.sizes import example_of
from runlora_fx.passes.read.phases import recomputed

_aten, _prims = torch.ops.aten, torch.ops.prims

#: Elements of a mask in a byte.
_BITS = 8


def packed_dim(mask: fx.Node) -> int | None:
    """The dimension along which a mask is packed; None if it cannot be packed.

    It cannot if a size is symbolic, if it is not contiguous in memory, or if 8 divides no size.
    """
    val = example_of(mask)
    if val is None or val.dtype is not torch.bool or not val.is_contiguous():
        return None
    if not all(type(size) is int and size for size in val.shape):
        return None
    dims = (i for i, size in enumerate(val.shape) if size % _BITS == 0)
    return max(dims, default=None)


class MaskPacker:
    """Packs the masks of a joint graph."""

    def __init__(self, graph: fx.Graph, runs_backward: Callable[[fx.Node], bool]) -> None:
        """Write into a graph.

        Args:
            graph: The graph.
            runs_backward: Whether the backward runs a node of the graph.
        """
        self._nodes = list(graph.nodes)
        self._order = {node: i for i, node in enumerate(self._nodes)}
        self._runs_backward = runs_backward
        self._insert = Inserter(graph, "pack: a mask is saved as bits")
        self._powers: dict[tuple[torch.device, torch.dtype, int], fx.Node] = {}
        self._first_mask: fx.Node | None = None

    def pack(self, masks: Iterable[fx.Node], again: Iterable[fx.Node]) -> set[fx.Node]:
        """Save masks as bits, inside a transaction of the caller's.

        What the backward recomputes of a mask is copied, and the copies read what is unpacked. The
        nodes themselves then run in the forward only. A mask that reaches a node of a user's
        checkpoint stays as it is.

        Args:
            masks: Masks that :func:`packed_dim` has a dimension for.
            again: Nodes that the backward recomputes, besides those that are tagged.

        Returns:
            The nodes that were copied.
        """
        again = set(again)
        found = {mask: self._reached(mask, again) for mask in masks}
        packed = {mask: packed_dim(mask) for mask, nodes in found.items() if nodes is not None}
        nodes = set(packed).union(*(found[mask] or () for mask in packed))
        reached = sorted(nodes, key=self._order.__getitem__)
        anchors = self._anchors(reached)
        now: dict[fx.Node, fx.Node] = {}
        self._first_mask = next((node for node in reached if node in packed), None)
        for node in filter(anchors.__contains__, reached):
            readers = self._readers(node)
            dim = packed.get(node)
            if dim is None:
                self._insert.move_to(anchors[node])
                now[node] = self._copied(node, now)
            else:
                now[node] = self._unpacked(node, dim, self._packed(node, dim), anchors[node])
                check_packing(node, now[node], dim)
            for reader in readers:
                reader.replace_input_with(node, now[node])
        copied = set(now).difference(packed)
        _check_copies(now, copied)
        leave_open(copied)
        return copied

    def _reached(self, mask: fx.Node, again: set[fx.Node]) -> set[fx.Node] | None:
        """What the backward may recompute of a mask; None if a user's checkpoint is part of it."""
        pending, reached = [mask], set[fx.Node]()
        while pending:
            node = pending.pop()
            for user in node.users:
                if user in reached or user not in self._order or self._runs_backward(user):
                    continue
                if recomputed(user) and user not in again and "ac_graph_id" in user.meta:
                    return None
                if user in again or recomputed(user) or self._is_inside(user):
                    reached.add(user)
                    pending.append(user)
        return reached

    def _is_inside(self, node: fx.Node) -> bool:
        """True if the backward recomputes a node where it recomputes what is made of it."""
        is_cheap = is_pointwise(node.target) or node.target in CASTS or node.target in VIEWS
        return is_cheap and node.meta.get("recompute") is None and not self._readers(node)

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes of the backward that read a node."""
        return [u for u in node.users if u in self._order and self._runs_backward(u)]

    def _anchors(self, reached: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
        """By node that the backward needs, the first node that needs it or what is made of it."""
        first: dict[fx.Node, int] = {}
        for node in reversed(reached):
            at = [self._order[reader] for reader in self._readers(node)]
            at += [first[user] for user in node.users if user in first]
            if at:
                first[node] = min(at)
        return {node: self._nodes[i] for node, i in first.items()}

    def _copied(self, node: fx.Node, now: dict[fx.Node, fx.Node]) -> fx.Node:
        """A node's call on what the backward reads instead."""
        args: Any = fx.node.map_arg(node.args, lambda n: now.get(n, n))
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: now.get(n, n))
        copy = self._insert(cast(Callable[..., Any], node.target), *args, **kwargs)
        recompute([copy], [copy])
        return copy

    def _packed(self, mask: fx.Node, dim: int) -> fx.Node:
        """The bits of a mask, which are saved."""
        shape, strides = mask.meta["val"].shape, mask.meta["val"].stride()
        rest = shape[dim] // _BITS
        before, after = list(shape[:dim]), list(shape[dim + 1 :])
        powers = self._powers_of_two(mask, torch.float32, len(after) + 1)
        self._insert.move_behind(mask)
        # Unlike a view, this has Inductor write the mask, and not the random numbers of 4 bytes.
        parts = self._insert(
            _aten.as_strided.default,
            mask,
            [*before, _BITS, rest, *after],
            [*strides[:dim], rest * strides[dim], *strides[dim:]],
        )
        terms = self._insert(_aten.mul.Tensor, parts, powers)
        # Inductor unrolls sums of fewer than eight terms.
        node = self._insert(_aten.view.default, terms, [*before, 4, 2, rest, *after])
        node = self._insert(_aten.sum.dim_IntList, node, [dim])
        node = self._insert(_aten.sum.dim_IntList, node, [dim])
        bits = self._insert(_prims.convert_element_type.default, node, torch.uint8)
        keep([bits])
        return bits

    def _unpacked(self, mask: fx.Node, dim: int, bits: fx.Node, anchor: fx.Node) -> fx.Node:
        """The mask, computed from its bits in front of a node."""
        shape = list(mask.meta["val"].shape)
        powers = self._powers_of_two(mask, torch.uint8, len(shape) - dim)
        self._insert.move_to(anchor)
        steps = [self._insert(_aten.unsqueeze.default, bits, dim)]
        steps.append(self._insert(_aten.bitwise_and.Tensor, steps[-1], powers))
        steps.append(self._insert(_aten.ne.Scalar, steps[-1], 0))
        steps.append(self._insert(_aten.view.default, steps[-1], shape))
        recompute(steps, steps)
        return steps[-1]

    def _powers_of_two(self, mask: fx.Node, dtype: torch.dtype, dims: int) -> fx.Node:
        """The value of each bit, along the first of some dimensions: shape (8, 1, ..., 1)."""
        device = mask.meta["val"].device
        key = (device, dtype, dims)
        if key not in self._powers:
            assert self._first_mask is not None
            self._insert.move_to(self._first_mask)
            like = {"dtype": torch.uint8, "device": device}
            one = self._insert(_aten.full.default, [], 1, **like)
            exponents = self._insert(
                _prims.iota.default, _BITS, start=0, step=1, requires_grad=False, **like
            )
            steps = [one, exponents]
            steps.append(self._insert(_aten.bitwise_left_shift.Tensor, one, exponents))
            if dtype is not torch.uint8:
                cast_to = _prims.convert_element_type.default
                steps.append(self._insert(cast_to, steps[-1], dtype))
            steps.append(self._insert(_aten.view.default, steps[-1], [_BITS, *[1] * (dims)]))
            recompute(steps, steps)
            self._powers[key] = steps[-1]
        return self._powers[key]


def _check_copies(now: Mapping[fx.Node, fx.Node], copied: Collection[fx.Node]) -> None:
    """Check that copies make the calls of their nodes on the same values.

    Raises:
        VerificationError: If one does not.
    """
    was = {new: old for old, new in now.items()}
    for node in copied:
        copy = now[node]
        args, kwargs = fx.node.map_arg((copy.args, copy.kwargs), lambda n: was.get(n, n))
        if (copy.target, args, kwargs) != (node.target, node.args, node.kwargs):
            raise VerificationError(f"{node.name}: {copy.name} is no copy of it")
