"""Upcast: products of 16-bit matrices run in float32, where that was measured to be faster.

    mm(x, w)  ->  to(mm(to(x, float32), to(w, float32)), bfloat16)

A CPU without instructions for 16-bit floats multiplies them many times slower than float32. The
graphs are those that Inductor compiles, after the partitioner: what is saved for the backward stays
as it is, in 16 bits. Inductor fuses the casts into the kernels around them.

Invariant: operands are cast exactly, and a result is rounded once, as the product rounded it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import fx

from runlora_fx._torch_compat import fake_mode_of, size_hint
from runlora_fx.cost_model.ops import MatMul
from runlora_fx.cost_model.profile import MachineProfile
from runlora_fx.passes.levels.sizes import dim_of, example_of

_aten = torch.ops.aten

#: By operator, where its two factors are among its arguments.
_FACTORS = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
}

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)

_cast = torch.ops.prims.convert_element_type.default

#: The profile of a device and a dtype.
Profiles: TypeAlias = Callable[[torch.device, str], MachineProfile]


def upcast(graph: fx.Graph, profiles: Profiles) -> int:
    """Run products in float32 that are predicted to be faster there.

    Args:
        graph: A graph of ATen operators. It is changed in place.
        profiles: What the devices' products take.

    Returns:
        How many products run in float32.
    """
    chosen = [node for node in graph.nodes if _is_chosen(node, profiles)]
    changed = set(chosen)
    casts: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node in changed:
            _compute_in_float32(graph, node, casts)
        elif _writes(node):
            casts.clear()  # what was cast may hold other values now
    return len(chosen)


def _is_chosen(node: fx.Node, profiles: Profiles) -> bool:
    """True if a node is a product of 16-bit matrices that is predicted to be faster in float32."""
    made = example_of(node)
    if node.target not in _FACTORS or made is None or made.dtype not in _SIXTEEN_BITS:
        return False
    left, right = (example_of(node.args[at]) for at in _FACTORS[node.target])
    if left is None or right is None or {left.dtype, right.dtype} != {made.dtype}:
        return False
    profile = profiles(made.device, str(made.dtype).removeprefix("torch."))
    return profile.upcasts(_product(left, right))


def _product(left: torch.Tensor, right: torch.Tensor) -> MatMul:
    """A product as the cost model knows it; symbolic sizes are those of the trace."""
    mode = fake_mode_of([left])

    def number(size: int | torch.SymInt) -> int:
        return size if isinstance(size, int) else size_hint(dim_of(size), mode, 1)

    *batch, m, k = map(number, left.shape)
    n = number(right.shape[-1])
    turned = (_is_turned(left), _is_turned(right))
    return MatMul(batch[0] if batch else 1, m, k, n, left.element_size(), turned)


def _is_turned(matrix: torch.Tensor) -> bool:
    """True if a matrix is stored transposed."""
    rows, columns = (dim_of(stride) for stride in matrix.stride()[-2:])
    return bool(rows == 1 and columns != 1)


def _compute_in_float32(graph: fx.Graph, node: fx.Node, casts: dict[fx.Node, fx.Node]) -> None:
    """Replace a product by one of operands that are cast, and a cast of its result."""

    def widened(operand: fx.Node) -> fx.Node:
        if operand not in casts:
            casts[operand] = _inserted(graph, operand, torch.float32)
        return casts[operand]

    made = example_of(node)
    assert made is not None  # it was chosen by it
    with graph.inserting_before(node):
        operands = [widened(x) if isinstance(x, fx.Node) else x for x in node.args]
        product = graph.call_function(node.target, tuple(operands), node.kwargs)  # type: ignore[arg-type]
        product.meta = {**node.meta, "val": made.to(torch.float32)}
        result = _inserted(graph, product, made.dtype)
        result.meta = {**node.meta, "val": made}
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _inserted(graph: fx.Graph, operand: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A cast of a tensor, at the place where the graph inserts."""
    cast = graph.call_function(_cast, (operand, dtype))
    val = example_of(operand)
    assert val is not None  # an operand of a product
    cast.meta["val"] = val.to(dtype)
    return cast


def _writes(node: fx.Node) -> bool:
    """True if an operator may write to memory."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and (schema is None or schema.is_mutable)
