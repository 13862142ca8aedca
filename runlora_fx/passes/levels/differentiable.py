"""Graphs that autograd may still differentiate: each node is read by its own level.

Example: a Dynamo graph with ``F.linear`` and one ``torch.ops.mine.op.default`` is read as a graph
of torch functions, and its ATen operators besides.

The target of a node determines its level: an ``OpOverload`` is an ATen operator, any other target
is a torch function or a method. So one table reads both. Emission writes torch functions if the
graph computes any tensor by one, and ATen operators otherwise.

Invariant: ``detach`` is not read at either level.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from runlora_fx.passes.levels.aten import DIFFERENTIABLE_ATEN
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.levels.sizes import example_of
from runlora_fx.passes.levels.torch_functions import TORCH

_READERS = {**TORCH.readers, **DIFFERENTIABLE_ATEN.readers}
_WRITES_ATEN = replace(DIFFERENTIABLE_ATEN, readers=_READERS)
_WRITES_TORCH = replace(TORCH, readers=_READERS, foreign=DIFFERENTIABLE_ATEN.foreign)


def level_of(graph: fx.Graph) -> Dialect:
    """The level of a graph.

    Args:
        graph: Every tensor node has an example tensor in ``meta["val"]``.
    """
    return _WRITES_TORCH if any(map(_is_torch_call, graph.nodes)) else _WRITES_ATEN


def _is_torch_call(node: fx.Node) -> bool:
    """True if a node computes a tensor by a torch function, a method or a module."""
    if example_of(node) is None:
        return False
    if node.op != "call_function":
        return node.op in ("call_method", "call_module")
    # ATen graphs contain operators of every kind, also higher-order ones.
    is_operator = isinstance(node.target, torch._ops.OperatorBase | torch._ops.OpOverloadPacket)
    return not is_operator and node.target is not operator.getitem
