"""Dequantised weights: made again in the backward, like the merged weights made of them.

Where plain operations dequantise a weight, the partitioner would keep the result for the backward:
a full copy of what was quantised to be small.
"""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.levels.sizes import value_of
from runlora_fx.passes.read.calls import name_of
from runlora_fx.passes.read.effects import Effects
from runlora_fx.passes.read.phases import recompute, recomputed

#: Operations that are followed from a weight back to the graph's inputs.
_MAX_NODES = 64

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "matmul", "linear")


def recompute_dequantised(weight: fx.Node, effects: Effects) -> None:
    """Have the backward make a weight again, if it was dequantised.

    That is a tensor which few simple operations make from inputs that are smaller than it is, and
    that nothing modifies.
    """
    for node in _chain(weight, effects):
        if not recomputed(node):
            recompute(node)


def _chain(weight: fx.Node, effects: Effects) -> list[fx.Node]:
    """What makes a tensor from inputs of the graph; nothing if that is not cheap to do again."""
    pending, chain, inputs = [weight], dict[fx.Node, None](), dict[fx.Node, None]()
    while pending:
        node = pending.pop()
        if effects.is_overwritten(node):
            return []
        if node.op == "placeholder":
            inputs[node] = None
        elif (
            node.op != "call_function" or not _is_simple(node, effects) or len(chain) >= _MAX_NODES
        ):
            return []
        elif node not in chain:
            chain[node] = None
            pending.extend(node.all_input_nodes)
    sizes, size = [_bytes(node) for node in inputs], _bytes(weight)
    is_smaller = None not in sizes and size is not None and sum(filter(None, sizes)) < size
    return list(chain) if is_smaller else []


def _is_simple(node: fx.Node, effects: Effects) -> bool:
    acts = effects.is_random(node) or effects.writes(node)
    return name_of(node.target) not in _PRODUCTS and not acts


def _bytes(node: fx.Node) -> int | None:
    """The size of a tensor, unless only the run knows it; nothing for anything else."""
    val = value_of(node)
    if val is None:
        return 0
    numel = val.numel()
    return numel * val.itemsize if isinstance(numel, int) else None
