"""Asked sizes: calls that read a size of a linear node, and other tensors that have the size.

    sym_size(mm(x, w), 0)      ->      sym_size(x, 0)

Graphs with symbolic sizes have many such calls. They read no element of the product, so the product
need not be a root for them.

Invariant: the other tensor stands before the call, is not linear, and has the same size.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import fx

from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.levels.sizes import example_of, shape_of

_SIZE = torch.ops.aten.sym_size.int


def held_elsewhere(
    nodes: Sequence[fx.Node], linear: Container[fx.Node]
) -> dict[fx.Node, tuple[fx.Node, int]]:
    """The calls that read a size of a linear node which another tensor has as well.

    Args:
        nodes: The nodes of a graph, in order.
        linear: The linear nodes.

    Returns:
        By call, the other tensor and its dimension.
    """
    if not any([node.target is _SIZE for node in nodes]):
        return {}
    holders: dict[Dim, tuple[fx.Node, int]] = {}
    found: dict[fx.Node, tuple[fx.Node, int]] = {}
    for node in nodes:
        if node.target is _SIZE:
            tensor, dim = node.args
            if isinstance(tensor, fx.Node) and isinstance(dim, int) and tensor in linear:
                holder = holders.get(shape_of(tensor)[dim])
                if holder is not None:
                    found[node] = holder
        elif node not in linear and example_of(node) is not None:
            for dim, size in enumerate(shape_of(node)):
                if not isinstance(size, int):
                    holders.setdefault(size, (node, dim))
    return found
