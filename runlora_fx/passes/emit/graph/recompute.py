"""Recompute tags: tensors that the backward computes again instead of saving them.

The partitioner saves tensors that the backward reads, unless ``meta["recompute"]`` says otherwise.
Three kinds of tensors are tagged. All are large, and cheap to compute again:

    M = W + s B A               a merged weight that a plan also makes in the backward
    W = dequantise(Wq, scales)  a weight that was quantised
    norm(h), mask * x           an activation, by price (:mod:`runlora_fx.passes.recompute`)

Invariant: tags of the incoming graph are the user's (checkpoint policies). None is changed, except
where the backward of a checkpoint would draw other random numbers than its forward. No other module
sets tags.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from runlora_fx.passes.levels.operators import COMPOSED_PRODUCTS, PRODUCTS, is_pointwise, names_of
from runlora_fx.passes.levels.sizes import example_of
from runlora_fx.passes.read.calls import name_of, operator_facts
from runlora_fx.passes.read.effects import Effects
from runlora_fx.passes.read.gradients import gradient_nodes

_COMPARISONS = (
    *(torch.ops.aten.gt.Scalar, torch.ops.aten.ge.Scalar),
    *(torch.ops.aten.lt.Scalar, torch.ops.aten.le.Scalar),
)

#: The largest number of operations between a dequantised weight and the graph's inputs.
_MAX_NODES = 64

_PRODUCTS = names_of(PRODUCTS | COMPOSED_PRODUCTS) | {"convolution"}


def recompute(nodes: Iterable[fx.Node], ours: Sequence[fx.Node] = ()) -> None:
    """Tag nodes so that the backward recomputes them, except those that the user has tagged.

    A node of ours that only recomputed nodes read is recomputed too, unless it is a product.
    Otherwise it would be saved for them. So is what a pointwise operator of ours computes from
    recomputed nodes, such as 2 X A'. Otherwise it would be saved instead of them.

    Args:
        nodes: The nodes.
        ours: The nodes that we wrote, in order. Their tags are copies of other nodes' tags, so they
            are overwritten.
    """
    again, written = set(nodes), set(ours)
    for node in ours:
        given = node.all_input_nodes
        is_made_of_it = not again.isdisjoint(given) and is_pointwise(node.target)
        if is_made_of_it and all(n in again or n.op != "call_function" for n in given):
            again.add(node)
    for node in reversed(ours):
        if node.users and again.issuperset(node.users) and name_of(node.target) not in _PRODUCTS:
            again.add(node)
    for node in again:
        if node in written or node.meta.get("recompute") is None:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def keep(nodes: Iterable[fx.Node]) -> None:
    """Have the backward use nodes of the forward as they are, but for those that are tagged."""
    for node in nodes:
        node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)


def leave_open(nodes: Iterable[fx.Node]) -> None:
    """Take the tags of nodes of ours away: the backward does not need what they compute."""
    for node in nodes:
        node.meta.pop("recompute", None)


def keep_before_overwriting(graph: fx.Graph, effects: Effects) -> None:
    """Tag what the forward computes of memory that it writes to later, so that it is saved.

    The partitioner saves inputs of the graph rather than what is made of them. It does not see that
    the backward would read what the forward has written.

    Args:
        graph: A joint graph.
        effects: What its nodes do besides computing a value.
    """
    gradients = gradient_nodes(graph)
    keep(
        node
        for node in graph.nodes
        if node.op == "call_function"
        and node not in gradients
        and not effects.writes(node)
        and not effects.is_overwritten(node)
        and any(map(effects.is_overwritten, node.all_input_nodes))
    )


def keep_random_numbers(
    graph: fx.Graph, effects: Effects, *, in_checkpoints: bool = False
) -> list[fx.Node]:
    """Tag random numbers so that the forward saves them, and the backward does not draw others.

    If random numbers are only compared with a probability, the mask is saved instead.

    Args:
        graph: A joint graph.
        effects: What its nodes do besides computing a value.
        in_checkpoints: Whether to save those of checkpoints, too. Otherwise they keep their tags.

    Returns:
        The nodes that were tagged.
    """
    found = []
    for node in graph.nodes:
        if not effects.is_random(node) or example_of(node) is None:
            continue
        is_masked = all(reader.target in _COMPARISONS for reader in node.users)
        for kept in node.users if is_masked else (node,):
            tag = kept.meta.get("recompute")
            if tag is None or (in_checkpoints and tag != CheckpointPolicy.MUST_SAVE):
                kept.meta["recompute"] = CheckpointPolicy.MUST_SAVE
                found.append(kept)
    return found


def recompute_dequantised(weights: Iterable[fx.Node], effects: Effects) -> None:
    """Tag dequantised weights so that the backward dequantises them again.

    A weight counts as dequantised if a few simple operations compute it from inputs of the graph
    that are smaller than it is, and if nothing writes to these inputs.
    """
    costly: set[fx.Node] = set()
    for weight in weights:
        recompute(_chain(weight, effects, costly))


def _chain(weight: fx.Node, effects: Effects, costly: set[fx.Node]) -> list[fx.Node]:
    """The nodes that compute a weight from inputs of the graph; none if they are not cheap.

    Args:
        weight: The weight.
        effects: What the nodes do besides computing a value.
        costly: Nodes that are known not to be cheap; more are added.
    """
    pending, chain, inputs = [weight], dict[fx.Node, None](), dict[fx.Node, None]()
    while pending:
        node = pending.pop()
        if node in chain or node in inputs:
            continue
        is_input = node.op == "placeholder"
        if effects.is_overwritten(node) or not (is_input or _is_simple(node, effects)):
            costly.add(node)
        if node in costly or len(chain) >= _MAX_NODES:
            costly.add(weight)
            return []
        if is_input:
            inputs[node] = None
        else:
            chain[node] = None
            pending.extend(node.all_input_nodes)
    sizes, size = [_bytes(node) for node in inputs], _bytes(weight)
    is_smaller = None not in sizes and size is not None and sum(filter(None, sizes)) < size
    return list(chain) if is_smaller else []


def _is_simple(node: fx.Node, effects: Effects) -> bool:
    known = operator_facts(node.target)
    if known is not None and known.is_pure:
        return known.name not in _PRODUCTS
    if node.op != "call_function" or name_of(node.target) in _PRODUCTS:
        return False
    return not (effects.is_random(node) or effects.writes(node))


def _bytes(node: fx.Node) -> int | None:
    """The size of a tensor [B]; None if it is symbolic, 0 if the node holds no tensor."""
    val = example_of(node)
    if val is None:
        return 0
    numel = val.numel()
    return numel * val.itemsize if isinstance(numel, int) else None
