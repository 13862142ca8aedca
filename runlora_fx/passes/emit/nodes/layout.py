"""Layouts: the strides of a tensor, and the question if its readers rely on them.

    X W', strides (o, 1)      ->      (W X')', the same numbers with strides (1, N)

A plan may compute a root transposed. An addition reads either layout. Fused attention and ``view``
fail, or compute something else, if the strides change.

Invariant: a root keeps its strides, unless every reader is on a closed list of operators that take
any strides. Strides of dimensions of size 1 are not compared: they have no effect. No comparison
adds a guard: symbolic strides are equal if their expressions are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import fx

from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.levels.modules import drops_nothing, is_plain_linear, module_of
from runlora_fx.passes.levels.operators import (
    CASTS,
    COMPOSED_PRODUCTS,
    PRODUCTS,
    REDUCTIONS,
    RESHAPES,
    VIEWS,
)
from runlora_fx.passes.levels.sizes import (
    equal,
    example_of,
    is_one,
    is_zero,
    numel,
    shape_of,
    strides_of,
)
from runlora_fx.passes.read.calls import name_of
from runlora_fx.runtime import kept_weights as reuse  # noqa: F401  (registers the operator)

#: How a reader depends on the layout of its operand. "ignores": its result is the same, strides
#: included. "follows": only the strides of its result change. "relies": it may fail or be wrong.
_Reading: TypeAlias = Literal["ignores", "follows", "relies"]

_aten = torch.ops.aten

#: Operators that compute the same result, strides included, for any strides of their operands.
_IGNORING = frozenset(
    [*PRODUCTS, _aten.contiguous.default, torch.ops.runlora.merged_weight.default]
)

#: Operators that are right for any strides, and whose result's strides follow from them; pointwise
#: operators are too.
_FOLLOWING = frozenset(
    [
        *(VIEWS - RESHAPES | CASTS | REDUCTIONS | COMPOSED_PRODUCTS),
        *(_aten.reshape.default, _aten.split.Tensor, _aten.split_with_sizes.default),
        *(_aten.unbind.int, _aten.cat.default, _aten.stack.default, _aten.clone.default),
        *(_aten._softmax.default, _aten._log_softmax.default, _aten.native_layer_norm.default),
        _aten.einsum.default,
    ]
)

#: Torch functions, methods and Python operators that take any layout, by name.
_FOLLOWING_NAMES = frozenset(
    [
        *("add", "sub", "mul", "div", "truediv", "neg", "relu", "gelu", "silu", "sigmoid", "tanh"),
        *("softmax", "log_softmax", "layer_norm", "sum", "mean", "float", "to", "getitem"),
        *("matmul", "mm", "bmm", "linear", "einsum", "permute", "transpose", "t", "reshape"),
        *("flatten", "unsqueeze", "squeeze", "contiguous", "clone"),
    ]
)

#: The modules whose functions of these names are torch's.
_KNOWN_MODULES = ("torch", "torch.nn.functional", "torch._C._nn", "_operator")


def memory_order(node: fx.Node, hint: Callable[[Dim], int]) -> list[int] | None:
    """The dimensions of a tensor from the outermost in memory to the innermost.

    Args:
        node: A tensor.
        hint: The size of a symbolic dimension.

    Returns:
        The permutation that makes the tensor contiguous; None if none does.
    """
    shape, strides = shape_of(node), strides_of(node)

    def place(d: int) -> tuple[bool, int, bool]:
        return not is_one(shape[d]), -hint(strides[d]), is_zero(shape[d])

    order = sorted(range(len(shape)), key=place)
    expected: Dim = 1
    for d in reversed(order):
        if not is_one(shape[d]) and not equal(strides[d], expected):
            return None
        if not is_zero(shape[d]):  # torch computes the strides of an empty tensor as if 0 were 1
            expected = numel((expected, shape[d]))
    return order


def is_relied_on(node: fx.Node) -> bool:
    """True if a reader relies on the strides of a tensor.

    Readers of results whose strides follow from the tensor's count too. The output of the graph
    relies on strides, because the user may take a view of it.
    """
    seen: set[fx.Node] = set()
    pending = [(user, node) for user in node.users]
    while pending:
        user, read = pending.pop()
        reading = _reading(user, read)
        if reading == "relies":
            return True
        if reading == "follows" and user not in seen:
            seen.add(user)
            pending.extend((below, user) for below in user.users)
    return False


def takes_any_layout(target: torch._ops.OpOverload) -> bool:
    """True if an operator computes the same numbers for any strides of its operands."""
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return torch.Tag.pointwise in target.tags or target in _FOLLOWING or target in _IGNORING


def _reading(user: fx.Node, node: fx.Node) -> _Reading:
    target: Any = user.target
    if isinstance(target, torch._ops.OpOverload):
        return _reading_of_operator(user, node, target)
    if user.op == "call_method":
        return "follows" if target in _FOLLOWING_NAMES else "relies"
    if user.op == "call_module":
        module = module_of(user)
        is_known = module is not None and (is_plain_linear(module) or drops_nothing(module))
        return "follows" if is_known else "relies"
    if user.op != "call_function":
        return "relies"
    is_known = getattr(target, "__module__", None) in (*_KNOWN_MODULES, None)
    return "follows" if is_known and name_of(target) in _FOLLOWING_NAMES else "relies"


def _reading_of_operator(user: fx.Node, node: fx.Node, target: torch._ops.OpOverload) -> _Reading:
    if target is _aten.copy_.default:
        return "ignores" if user.args[0] is not node else "relies"
    if target in _IGNORING or user.kwargs.get("memory_format") is torch.contiguous_format:
        return "ignores"
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    if target._schema.is_mutable or is_random:
        return "relies"  # random numbers are drawn in memory order
    if torch.Tag.pointwise not in target.tags and target not in _FOLLOWING:
        return "relies"
    return "ignores" if _is_new_vector(user, target) else "follows"


def _is_new_vector(node: fx.Node, target: torch._ops.OpOverload) -> bool:
    """True if a node makes a vector in new memory: its strides can only be (1,)."""
    val = example_of(node)
    is_new = all(result.alias_info is None for result in target._schema.returns)
    return is_new and val is not None and val.dim() <= 1
