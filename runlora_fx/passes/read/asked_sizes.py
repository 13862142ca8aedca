"""Asked sizes: the sizes that a graph asks of linear nodes, and other tensors that have them.

Example: ``sym_size(mm(x, w), 0)`` is ``sym_size(x, 0)``. Graphs with symbolic sizes are full of
such calls. They need no element of the product, so that they make no root of it.

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
    """The calls that ask a linear node for a size that another tensor has as well.

    Args:
        nodes: Those of a graph, in order.
        linear: The linear nodes.

    Returns:
        For each call the other tensor and the dimension of it.
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
