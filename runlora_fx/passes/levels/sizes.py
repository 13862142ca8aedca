"""Sizes: the shapes and strides of example tensors, and comparisons of them.

Example: ``s0 * 8`` and ``8 * s0`` are the same size, ``s0`` and ``s1`` are not known to be.

A size is an integer or the sympy expression of a SymInt (:data:`Dim`), multiplied out. A SymInt
itself is never compared, because that adds a guard to the graph, or raises for an unbacked symbol.
The functions here compare expressions instead. "Equal" means equal for all values of the symbols,
so a comparison with an unknown size returns False.

Invariant: no function of this module adds a guard or raises for a symbolic size.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import sympy
import torch
from torch import fx

from runlora_fx._torch_names import FloorDiv, Max
from runlora_fx.passes.algebra.posed import Dim

Shape: TypeAlias = tuple[Dim, ...]

#: The facts of tensors, by identity. Every stage reads them many times, and symbolic sizes are slow
#: to look up. They are forgotten after each pass.
_known: dict[int, tuple[weakref.ref[torch.Tensor], TensorFacts]] = {}

#: One object for each combination of dtype, device and layout; and one for each with a shape.
_kinds: dict[TensorKind, TensorKind] = {}
_facts: dict[Hashable, TensorFacts] = {}


class TensorKind(NamedTuple):
    """What two tensors must have in common to be added or multiplied without a conversion."""

    dtype: torch.dtype
    device: torch.device
    layout: torch.layout


class TensorFacts(NamedTuple):
    """The facts of an example tensor; one object for all tensors with equal facts.

    Attributes:
        shape: Its sizes.
        kind: Its dtype, device and layout; one object for all tensors of the kind.
        is_plain: True if it is a dense tensor of floating-point numbers.
    """

    shape: Shape
    kind: TensorKind
    is_plain: bool


# --- reading


def example_of(node: object) -> torch.Tensor | None:
    """The example tensor of a node, or None."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return val if isinstance(val, torch.Tensor) else None


def facts_of(node: object) -> TensorFacts | None:
    """The facts of the tensor of a node; None if the node holds no tensor."""
    if not isinstance(node, fx.Node):
        return None
    val = node.meta.get("val")
    known = _known.get(id(val))
    if known is not None and known[0]() is val:
        return known[1]
    return _looked_up(val) if isinstance(val, torch.Tensor) else None


def _looked_up(val: torch.Tensor) -> TensorFacts:
    size, dtype, device, layout = val.shape, val.dtype, val.device, val.layout
    try:
        key = (size, dtype, device, layout)
        facts = _facts.get(key)
    except TypeError:  # symbolic sizes have no hash
        facts, key = None, None
    if facts is None:
        kind = TensorKind(dtype, device, layout)
        is_plain = dtype.is_floating_point and layout == torch.strided
        facts = TensorFacts(tuple(map(dim_of, size)), _kinds.setdefault(kind, kind), is_plain)
        if key is not None:
            _facts[key] = facts
    _known[id(val)] = weakref.ref(val), facts
    return facts


def dim_of(size: int | torch.SymInt) -> Dim:
    """A size as an integer or a sympy expression."""
    return size if isinstance(size, int) else _multiplied_out(size.node.expr)


def shape_of(node: fx.Node) -> Shape:
    """Sizes of a tensor node [elements].

    Raises:
        TypeError: If the node holds no tensor.
    """
    val = node.meta.get("val")
    known = _known.get(id(val))
    if known is not None and known[0]() is val:  # as facts_of(): asked the most often
        return known[1].shape
    facts = facts_of(node)
    if facts is None:
        raise TypeError(f"{node.name} holds no tensor")
    return facts.shape


def forget_shapes() -> None:
    """Forget the facts of all tensors.

    This is needed when a guard has replaced a symbol by a number, and after a pass to free memory.
    """
    _known.clear()
    _facts.clear()


def strides_of(node: fx.Node) -> Shape:
    """Strides of a tensor node [elements].

    Raises:
        TypeError: If the node holds no tensor.
    """
    val = example_of(node)
    if val is None:
        raise TypeError(f"{node.name} holds no tensor")
    return tuple(dim_of(stride) for stride in val.stride())


def requested_shape(size: Sequence[object]) -> Shape | None:
    """The sizes that a call such as ``expand`` asks for; None if one is neither number nor node."""
    found: list[Dim] = []
    for asked in size:
        value = asked.meta.get("val") if isinstance(asked, fx.Node) else asked
        if not isinstance(value, int | torch.SymInt):
            return None
        found.append(dim_of(value))
    return tuple(found)


# --- questions


def equal(a: Dim, b: Dim) -> bool:
    """True if two sizes are known to be equal."""
    return bool(a == b)  # for expressions: structural equality


def is_one(size: Dim) -> bool:
    """True if a size is known to be 1."""
    return equal(size, 1)


def is_zero(size: Dim) -> bool:
    """True if a size is known to be 0."""
    return equal(size, 0)


def same_shape(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """True if two shapes are known to be equal, size by size."""
    return tuple(a) == tuple(b)  # as :func:`equal`, size by size


def all_one(sizes: Iterable[Dim]) -> bool:
    """True if every size is known to be 1."""
    return not any([size != 1 for size in sizes])  # as :func:`is_one`, size by size


def index_of(size: Dim, sizes: Sequence[Dim], start: int = 0) -> int | None:
    """Where a size first stands among others, from a position on; None if it does not."""
    return next((i for i in range(start, len(sizes)) if equal(sizes[i], size)), None)


# --- products


def numel(shape: Sequence[Dim]) -> Dim:
    """The product of the sizes."""
    total: Dim = 1
    for size in shape:
        total = total * size
    return total if isinstance(total, int) else _multiplied_out(total)


def factors_of(size: Dim) -> list[Dim]:
    """The sizes whose product a size is; none if it is no product."""
    if isinstance(size, int) or not size.is_Mul:
        return []
    return [_multiplied_out(factor) for factor in size.args]


def prefix_products(shape: Sequence[Dim]) -> Shape:
    """The products of the first 0, 1, 2, ... sizes."""
    return tuple(numel(shape[:n]) for n in range(len(shape) + 1))


# --- layouts


def same_strides(a: fx.Node, b: fx.Node) -> bool:
    """True if two tensors of equal shape are known to have equal strides."""
    shape = shape_of(a)
    if not same_shape(shape, shape_of(b)):
        return False
    return all(
        is_one(size) or equal(one, other)
        for size, one, other in zip(shape, strides_of(a), strides_of(b), strict=True)
    )


def is_column_major(node: fx.Node) -> bool:
    """True if a matrix is known to lie transposed in memory: column by column."""
    if example_of(node) is None or len(shape_of(node)) != 2:
        return False
    if any(map(is_one, shape_of(node))):
        return False
    first, last = strides_of(node)
    return is_one(first) and not is_one(last)


@lru_cache(maxsize=1 << 14)
def _multiplied_out(size: sympy.Expr) -> Dim:
    """The one way to write an expression here, so that equal products are written alike."""
    if size.has(FloorDiv, Max):  # -1 in a view of (s, s, i): (s**2) // s
        size = size.replace(FloorDiv, _quotient).replace(Max, _largest)
    expanded = sympy.expand(size)
    return int(expanded) if expanded.is_Integer else expanded


def _quotient(size: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    """``size // divisor``, without the division where it leaves no rest for any size.

    Whoever divides by a size has sizes that are not 0.
    """
    divided = sympy.cancel(size / divisor)
    return divided if sympy.fraction(divided)[1] == 1 else FloorDiv(size, divisor)


def _largest(*sizes: sympy.Expr) -> sympy.Expr:
    """The largest size; the others if one of them is 1 and another one is known to be positive."""
    others = [size for size in sizes if size != 1]
    is_at_least_one = any(size.is_integer and size.is_positive for size in others)
    largest: sympy.Expr = Max(*(others if is_at_least_one else sizes))  # type: ignore[no-untyped-call]
    return largest
