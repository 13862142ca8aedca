"""Kept weights: a merged weight is kept between calls only if nothing can write to it.

    M = runlora.merged_weight(W, B, A, s); return M       ->  M = addmm(W, B, A, alpha=s); return M
    M = runlora.merged_weight(W, B, A, s); return X M'    stays as it is

The operator returns the same tensor in every call. If the user gets this tensor and edits it in
place, all later calls are wrong.

Invariant: all readers of a kept tensor, and of its views, are on a closed list of operators that
write to no operand. No output of the graph is a kept tensor or a view of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from runlora_fx.passes.levels.operators import (
    CASTS,
    COMPOSED_PRODUCTS,
    PRODUCTS,
    REDUCTIONS,
    VIEWS,
    is_pointwise,
)
from runlora_fx.runtime import kept_weights as reuse  # noqa: F401  (registers the operator)

_aten = torch.ops.aten
_MERGED = torch.ops.runlora.merged_weight.default

#: Operators that only read a tensor and make another one.
_READERS = PRODUCTS | COMPOSED_PRODUCTS | REDUCTIONS | {_MERGED}

#: Operators whose result may share memory with their operand. Copies and casts are among them,
#: because a compiler may remove them.
_SAME_MEMORY = VIEWS | CASTS | {_aten.clone.default}


def stop_keeping_what_escapes(graph: fx.Graph, addmm: Callable[..., Any]) -> int:
    """Replace, in place, kept weights that something may write to by weights merged in every call.

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
        is_new = is_pointwise(target) and not target._schema.is_mutable
        if target not in _SAME_MEMORY and not is_new:
            return False
        seen.add(user)
        pending.extend(user.users)
    return True


def _memory(node: fx.Node) -> fx.Node:
    """The node whose memory a view may share."""
    while node.target in _SAME_MEMORY:
        node = cast(fx.Node, node.args[0])
    return node
