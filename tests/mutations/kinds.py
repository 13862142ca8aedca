"""Mistakes: what could be written instead of a call that was asked for.

    MISTAKES["lost scale"](addmm(c, a, b, alpha=2), place) -> addmm(c, a, b)

Each takes a call and yields other calls. Arguments of a call may be calls, which are written first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

_aten, _prims = torch.ops.aten, torch.ops.prims


@dataclass(frozen=True)
class Call:
    """A call that is to be written."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a call is written.

    Attributes:
        value: The example value of the call.
        came: The nodes of the incoming graph that stand in front of it.
        ours: The nodes that were written in front of it.
        rule: What it is written for.
    """

    value: Tensor
    came: Sequence[fx.Node]
    ours: Sequence[fx.Node]
    rule: str = ""


Mistake: TypeAlias = Callable[[Call, Place], Iterator[Call]]


def _with(call: Call, at: int, arg: Any) -> Call:
    return replace(call, args=(*call.args[:at], arg, *call.args[at + 1 :]))


def _tensors(call: Call) -> Iterator[tuple[int, fx.Node, Tensor]]:
    """The arguments that are tensors, and where they stand."""
    for at, arg in enumerate(call.args):
        if isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), Tensor):
            yield at, arg, arg.meta["val"]


def _turned(node: Any, dims: int) -> Call:
    return Call(_aten.permute.default, (node, [*range(dims - 2), dims - 1, dims - 2]))


def _transposed(call: Call, place: Place) -> Iterator[Call]:
    for at, node, val in _tensors(call):
        if val.dim() >= 2 and val.shape[-1] == val.shape[-2] > 1:
            yield _with(call, at, _turned(node, val.dim()))


def _swapped(call: Call, place: Place) -> Iterator[Call]:
    for (i, one, _), (j, other, _) in combinations(_tensors(call), 2):
        yield _with(_with(call, i, other), j, one)


def _numbers(call: Call) -> Iterator[tuple[float, Callable[[Any], Call]]]:
    """The factors that stand in a call, and how to replace them."""
    if "alpha" in call.kwargs:
        alpha = call.kwargs["alpha"]
        yield alpha, lambda x: replace(call, kwargs={**call.kwargs, "alpha": x})
    if call.target in (_aten.mul.Tensor, _aten.mul.Scalar, torch.ops.runlora.merged_weight.default):
        at = len(call.args) - 1
        if isinstance(call.args[at], int | float):
            yield call.args[at], lambda x: _with(call, at, x)


def _lost_scale(call: Call, place: Place) -> Iterator[Call]:
    for number, put in _numbers(call):
        yield from (put(type(number)(x)) for x in (1, 3) if x != number)


def _wrong_sign(call: Call, place: Place) -> Iterator[Call]:
    if place.value.is_floating_point():
        yield Call(_aten.neg.default, (call,))
    yield from (put(-number) for number, put in _numbers(call))


def _dropped_term(call: Call, place: Place) -> Iterator[Call]:
    if call.target in (_aten.add.Tensor, _aten.sub.Tensor, _aten.addmm.default):
        for _, node, val in _tensors(call):
            if val.shape == place.value.shape:
                yield Call(_aten.mul.Tensor, (node, 1))
    if call.target is _aten.addmm.default:
        made: Any = Call(_aten.mm.default, call.args[1:3])
        alpha = call.kwargs.get("alpha", 1)
        yield made if alpha == 1 else Call(_aten.mul.Tensor, (made, alpha))
    if call.target is _aten.index_put.default and call.args[3:] == (True,):
        yield _with(call, 3, False)


def _likes(node: fx.Node, nodes: Sequence[fx.Node], most: int = 2) -> list[fx.Node]:
    """The nearest nodes that hold other tensors of the same shape and dtype."""
    val = node.meta["val"]
    found = [
        other
        for other in reversed(nodes)
        if other is not node
        and isinstance(other.meta.get("val"), Tensor)
        and (other.meta["val"].shape, other.meta["val"].dtype) == (val.shape, val.dtype)
    ]
    return found[:most]


def _stale_leaf(call: Call, place: Place) -> Iterator[Call]:
    for at, node, val in _tensors(call):
        if val.is_floating_point():
            yield from (_with(call, at, other) for other in _likes(node, place.came))


def _other_value(call: Call, place: Place) -> Iterator[Call]:
    for at, node, val in _tensors(call):
        if val.is_floating_point():
            yield from (_with(call, at, other) for other in _likes(node, place.ours))


def _wrong_dtype(call: Call, place: Place) -> Iterator[Call]:
    dtype = place.value.dtype
    if dtype.is_floating_point:
        cast = Call(_prims.convert_element_type.default, (call, torch.bfloat16))
        yield from (cast, Call(_prims.convert_element_type.default, (cast, dtype)))


def _wrong_strides(call: Call, place: Place) -> Iterator[Call]:
    dims = place.value.dim()
    if dims >= 2 and place.value.is_contiguous():
        copy = Call(
            _aten.clone.default,
            (_turned(call, dims),),
            {"memory_format": torch.contiguous_format},
        )
        yield _turned(copy, dims)


def _wrong_mask(call: Call, place: Place) -> Iterator[Call]:
    for at, node, val in _tensors(call):
        if val.dtype == torch.bool:
            yield _with(call, at, Call(_aten.logical_not.default, (node,)))
            yield from (_with(call, at, other) for other in _likes(node, place.came))
        elif _is_masked(node):
            masked = [other for other in place.came if _is_masked(other)]
            bare = [other for other in node.all_input_nodes if other.op == "placeholder"]
            others = [*_likes(node, masked), *_likes(node, bare)]
            yield from (_with(call, at, other) for other in others)


def _is_masked(node: fx.Node, depth: int = 3) -> bool:
    """True if random numbers are among what a node of the incoming graph is made of."""
    if "dropout" in str(node.target) or "bernoulli" in str(node.target):
        return True
    return depth > 0 and any(_is_masked(below, depth - 1) for below in node.all_input_nodes)


def _wrong_index(call: Call, place: Place) -> Iterator[Call]:
    for at, arg in enumerate(call.args):
        nodes = arg if isinstance(arg, list | tuple) else (arg,)
        for i, node in enumerate(nodes):
            val = node.meta.get("val") if isinstance(node, fx.Node) else None
            if isinstance(val, Tensor) and val.dtype == torch.int64:
                other: Any = Call(_aten.rsub.Scalar, (node, 1))  # there are two
                if not isinstance(arg, list | tuple):
                    yield _with(call, at, other)
                else:
                    yield _with(call, at, [*arg[:i], other, *arg[i + 1 :]])


def _wrong_pick(call: Call, place: Place) -> Iterator[Call]:
    """Slices that begin elsewhere, and parts that are joined in another order."""
    if call.target is _aten.slice.Tensor and not place.rule.startswith("stack"):
        yield from _moved(call)
    if call.target is _prims.iota.default:
        yield replace(call, kwargs={**call.kwargs, "start": 1})
    if call.target is _aten.select.int:
        yield from (_with(call, 2, call.args[2] + by) for by in (-1, 1) if call.args[2] + by >= 0)


def _moved(call: Call) -> Iterator[Call]:
    whole, dim, begin, end = call.args[:4]
    size = whole.meta["val"].shape[dim]
    for by in (begin - end, -1, 1, end - begin):
        if begin + by >= 0 and end + by <= size:
            yield replace(call, args=(whole, dim, begin + by, end + by, *call.args[4:]))


def _cut_elsewhere(call: Call, place: Place) -> Iterator[Call]:
    if not place.rule.startswith("stack"):
        return
    if call.target is _aten.slice.Tensor:
        yield from _moved(call)
    if call.target is _aten.cat.default:
        parts = call.args[0]
        for i, j in combinations(range(len(parts)), 2):
            if parts[i].meta["val"].shape == parts[j].meta["val"].shape:
                other = list(parts)
                other[i], other[j] = parts[j], parts[i]
                yield _with(call, 0, other)


def _wrong_constant(call: Call, place: Place) -> Iterator[Call]:
    if call.target is _aten.full.default:
        yield _with(call, 1, call.args[1] + 1)


def _wrong_dimension(call: Call, place: Place) -> Iterator[Call]:
    if call.target in (_aten.sum.dim_IntList, _aten.unsqueeze.default, _aten.permute.default):
        (val,) = (val for _, _, val in _tensors(call))
        if call.target is _aten.sum.dim_IntList and len(call.args[1]) == 1:
            yield from (_with(call, 1, [dim]) for dim in range(val.dim()) if [dim] != call.args[1])
        elif call.target is _aten.permute.default:
            yield _with(call, 1, list(range(val.dim())))


MISTAKES: dict[str, Mistake] = {
    "transposed operand": _transposed,
    "swapped operands": _swapped,
    "lost scale": _lost_scale,
    "wrong sign": _wrong_sign,
    "dropped term": _dropped_term,
    "stale leaf": _stale_leaf,
    "value of another call": _other_value,
    "wrong dtype": _wrong_dtype,
    "wrong strides": _wrong_strides,
    "wrong mask": _wrong_mask,
    "wrong expert or adapter": _wrong_index,
    "wrong pick": _wrong_pick,
    "stack cut elsewhere": _cut_elsewhere,
    "wrong constant": _wrong_constant,
    "wrong dimension": _wrong_dimension,
}
