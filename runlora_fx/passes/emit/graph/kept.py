"""Kept weights: merged weights that are kept from call to call, where nobody can write to them.

    M = runlora.merged_weight(W, B, A, s); return M       ->  M = addmm(W, B, A, alpha=s); return M
    M = runlora.merged_weight(W, B, A, s); return X M'    stays

The operator returns the same tensor in every call. Whoever gets hold of it and edits it in place
corrupts all later calls.

Invariant: a kept tensor is read by operators on a closed list only, which make new memory or views
that are read in the same way. It is neither an output of the graph nor the memory of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

_aten = torch.ops.aten
_MERGED = torch.ops.runlora.merged_weight.default

#: Operators that only read a tensor and make another one.
_READERS = frozenset(
    [
        *(_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default),
        *(_aten.mv.default, _aten.matmul.default, _aten.linear.default, _MERGED),
        *(_aten.sum.default, _aten.sum.dim_IntList, _aten.linalg_vector_norm.default),
        *(_aten.mean.default, _aten.mean.dim, _aten.amax.default, _aten.amin.default),
        *(_aten.var.correction, _aten.var_mean.correction),
    ]
)

#: Operators whose result is, or may be made, the memory of what they read: a compiler takes out
#: copies and additions of zero.
_SAME_MEMORY = frozenset(
    [
        *(_aten.permute.default, _aten.transpose.int, _aten.t.default, _aten.view.default),
        *(_aten._unsafe_view.default, _aten.reshape.default, _aten.unsqueeze.default),
        *(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.expand.default),
        *(_aten.alias.default, _aten.detach.default, _aten.clone.default, _aten.to.dtype),
        *(_aten._to_copy.default, torch.ops.prims.convert_element_type.default),
    ]
)


def stop_keeping_what_escapes(graph: fx.Graph, addmm: Callable[..., Any]) -> int:
    """Make merged weights anew in every call where something may write to them, in place.

    Args:
        graph: A graph of ATen operators.
        addmm: The operator that merges.

    Returns:
        The number of weights that are no longer kept.
    """
    kept = [node for node in graph.nodes if node.target is _MERGED]
    anew: set[fx.Node] = set()
    for node in kept:
        if _is_only_read(node) and anew.isdisjoint(map(_memory, node.all_input_nodes)):
            continue
        base, left, right, alpha = cast(Any, node.args)
        with graph.inserting_before(node):
            weight = graph.call_function(addmm, (base, left, right), {"alpha": alpha})
        weight.meta = node.meta
        node.replace_all_uses_with(weight)
        graph.erase_node(node)
        anew.add(weight)
    return len(anew)


def _is_only_read(node: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    pending: list[fx.Node] = list(node.users)
    while pending:
        user = pending.pop()
        target: Any = user.target
        if target in _READERS or user in seen:
            continue
        if target not in _SAME_MEMORY and not _is_pointwise(target):
            return False
        seen.add(user)
        pending.extend(user.users)
    return True


def _is_pointwise(target: Any) -> bool:
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.pointwise in target.tags
        and not target._schema.is_mutable
    )


def _memory(node: fx.Node) -> fx.Node:
    """The node that a view shows."""
    while node.target in _SAME_MEMORY:
        node = cast(fx.Node, node.args[0])
    return node
