"""Groups of ATen operators: what moves no element, casts, multiplies, or adds up.

    aten.permute    in VIEWS          shows the elements of its operand in another shape or order
    aten.mm         in PRODUCTS       reads its operands, whatever their strides are
    aten.amax       in REDUCTIONS     runs in one kernel with the pointwise operators before it

Each stage asks another question of an operator, and puts its answer together from these groups:
may it run again (:mod:`runlora_fx.passes.recompute.chains`), does it rely on strides
(:mod:`runlora_fx.passes.emit.nodes.layout`), does it only read a kept weight
(:mod:`runlora_fx.passes.emit.graph.kept`). Torch's functions of the same names are known to be pure
(:mod:`runlora_fx.passes.read.known_calls`).

Invariant: all of a group are pure, and the groups are disjoint. Every other property is the stage's
to add.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import fx

_aten = torch.ops.aten

#: Views of all elements in the order of the memory: they fail, or copy, where strides do not fit.
RESHAPES = frozenset([_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default])

#: Views of all elements, for any strides.
_WHOLE = frozenset(
    [
        *(_aten.permute.default, _aten.transpose.int, _aten.t.default, _aten.unsqueeze.default),
        *(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.expand.default),
        *(_aten.alias.default, _aten.detach.default),
    ]
)

#: Operators whose first operand is a tensor, and whose result shows elements of it.
VIEWS = frozenset([*RESHAPES, *_WHOLE, _aten.slice.Tensor, _aten.select.int])

#: Conversions to another dtype.
CASTS = frozenset(
    [torch.ops.prims.convert_element_type.default, _aten._to_copy.default, _aten.to.dtype]
)

#: Products of matrices, vectors or batches of matrices, into new contiguous memory.
PRODUCTS = frozenset(
    [
        *(_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default),
        *(_aten.mv.default, _aten.dot.default),
    ]
)

#: Products that are composed of others, into new memory: its strides depend on the operands.
COMPOSED_PRODUCTS = frozenset([_aten.matmul.default, _aten.linear.default])

#: Reductions of a tensor along some dimensions.
REDUCTIONS = frozenset(
    [
        *(_aten.sum.default, _aten.sum.dim_IntList, _aten.mean.default, _aten.mean.dim),
        *(_aten.amax.default, _aten.amin.default, _aten.linalg_vector_norm.default),
        *(_aten.var.correction, _aten.var_mean.correction),
    ]
)


def is_pointwise(target: object) -> bool:
    """True if every element of a result is computed from the elements in its place."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def readers_of(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a node, as it is or through views; once for each view that it reads."""
    for user in node.users:
        if user.target in VIEWS:
            yield from readers_of(user)
        else:
            yield user


def names_of(operators: Iterable[torch._ops.OpOverload]) -> frozenset[str]:
    """The names of operators without namespace and overload, as torch's functions have them."""
    return frozenset(str(operator.overloadpacket.__name__) for operator in operators)
