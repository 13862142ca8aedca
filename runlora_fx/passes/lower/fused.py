"""Fused products: operators that dequantise a weight and multiply by it, spelled out; and back.

``bitsandbytes::gemm_4bit(x, W_q, ...)`` hides ``x deq(W_q)'``: without the product, a weight and
its adapter cannot be merged. Spelled out the dequantised weight is a leaf, as it is where a library
dequantises in the graph. Products that the rewriting leaves as they are become the fused operator
again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import fx

from runlora_fx.passes.context import Context
from runlora_fx.passes.emit.nodes import Inserter
from runlora_fx.passes.emit.recompute import recompute
from runlora_fx.passes.emit.transaction import transaction
from runlora_fx.passes.levels.sizes import is_contiguous, value_of

_aten = torch.ops.aten


class _Spelled(NamedTuple):
    """The call that was spelled out, and the node that now reads its first argument."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reader: fx.Node


@contextmanager
def fused_products(context: Context) -> Iterator[None]:
    """A context in which fused products are spelled out; in the end those still there are put back.

    Whatever is raised inside, or by putting them back, leaves the graph as it came.
    """
    with transaction(context.graph):
        fused = _Fused(context.graph)
        yield
        fused.undo()


class _Fused:
    """The fused products of a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        """Spell out every fused product, in place."""
        self._graph = graph
        self._insert = Inserter(graph, "dequantised: a fused product is spelled out")
        self._spelled: dict[fx.Node, _Spelled] = {}
        for node in list(graph.nodes):
            if str(node.target) == "bitsandbytes.gemm_4bit.default":
                x = node.args[0]
                if isinstance(x, fx.Node) and is_contiguous(x):  # its rows are a view
                    self._spell(node)

    def undo(self) -> None:
        """Put back the operators whose products are still there; drop what is left over."""
        alive = set(self._graph.nodes)
        for product, spelled in self._spelled.items():
            if product not in alive or spelled.reader not in alive:
                continue
            # What is multiplied may itself have been written anew.
            args = (spelled.reader.args[0], *spelled.args[1:])
            with self._graph.inserting_before(product):
                fused = self._graph.call_function(spelled.target, args, spelled.kwargs)
            fused.meta = dict(product.meta)
            product.replace_all_uses_with(fused)
        for node in reversed(self._insert.written):
            if node in alive and not node.users:
                self._graph.erase_node(node)

    def _spell(self, node: fx.Node) -> None:
        self._insert.move_to(node)
        args, kwargs = cast(Any, node.args), cast(Any, dict(node.kwargs))
        reader, product = _gemm_4bit(self._insert, *args, **kwargs)
        self._spelled[product] = _Spelled(node.target, args, kwargs, reader)
        node.replace_all_uses_with(product)
        self._graph.erase_node(node)


def _gemm_4bit(
    call: Inserter,
    x: fx.Node,
    packed: fx.Node,
    shape: Any,
    absmax: fx.Node,
    blocksize: int,
    kind: str,
    bias: fx.Node | None = None,
    absmax_8bit: fx.Node | None = None,
    absmax_code: fx.Node | None = None,
    absmax_offset: fx.Node | None = None,
) -> tuple[fx.Node, fx.Node]:
    """The product of bitsandbytes with a 4-bit weight, as its default implementation computes it.

    The scales of the blocks may themselves be quantised in 8 bits.
    """
    operators = torch.ops.bitsandbytes
    value, written = value_of(x), len(call.written)
    assert value is not None
    if absmax_8bit is not None:
        dequantise = operators.dequantize_blockwise.default
        absmax = call(dequantise, absmax_8bit, absmax, absmax_code, 256, torch.float32)
        absmax = call(_aten.add.Tensor, absmax, absmax_offset)
    dequantise = operators.dequantize_4bit.default
    weight = call(dequantise, packed, absmax, blocksize, kind, shape, value.dtype)
    # Else the partitioner would keep the weight for the backward.
    recompute(call.written[written:], call.written)
    columns = call(_aten.permute.default, weight, [1, 0])
    if value.dim() == 2:
        reader = product = call(_aten.mm.default, x, columns)
    else:
        reader = call(_aten.view.default, x, [-1, value.shape[-1]])
        product = call(_aten.mm.default, reader, columns)
    if bias is not None:
        product = call(_aten.add.Tensor, product, bias)
    if value.dim() != 2:
        product = call(_aten.view.default, product, [*_sizes(x, value, call), shape[0]])
    return reader, product


def _sizes(x: fx.Node, value: torch.Tensor, call: Inserter) -> list[int | fx.Node]:
    """The leading sizes of a tensor; at most one of them is left to be inferred."""
    sizes = value.shape[:-1]
    if sum(not isinstance(size, int) for size in sizes) <= 1:
        return [size if isinstance(size, int) else -1 for size in sizes]
    return [
        size if isinstance(size, int) else call(_aten.sym_size.int, x, i)
        for i, size in enumerate(sizes)
    ]
