"""Forms against the operators they stand for, and leaves that no node holds."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx

from runlora_fx.passes.algebra.addends import Addends, total
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.levels import forms
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.levels.cuts import Cut
from runlora_fx.passes.levels.origins import LeafWriter, Numbers
from runlora_fx.passes.levels.sizes import shape_of
from runlora_fx.passes.read.effects import Effects
from runlora_fx.passes.read.leaves import Leaves
from runlora_fx.passes.read.polynomial_reader import PolynomialReader
from runlora_fx.passes.read.value_numbers import ValueNumbers

aten: Any = torch.ops.aten


class _OneStep(PolynomialReader):
    """Expands one node; everything that it reads is a leaf."""

    def operand(self, node: fx.Node, cut: Cut) -> Addends:
        return (self.leaves.matrix(self.values, node, cut),)


def _read(
    target: Any, *args: Any, **kwargs: Any
) -> tuple[_OneStep, fx.Node, dict[fx.Node, Tensor]]:
    """A graph of one call on tensors, and the tensors by the node that holds them."""
    graph = fx.Graph()
    values: dict[fx.Node, Tensor] = {}

    def held(x: Any) -> Any:
        if isinstance(x, list):
            return [held(y) for y in x]
        if not isinstance(x, Tensor):
            return x
        node = graph.placeholder(f"x{len(values)}")
        node.meta["val"] = values[node] = x
        return node

    node = graph.call_function(target, tuple(map(held, args)), kwargs)
    node.meta["val"] = target(*args, **kwargs)
    form = ATEN.read(node)
    assert form is not None
    reading = _OneStep(ValueNumbers(graph, Effects(graph)), Leaves(), {node: form})
    return reading, node, values


def _value(p: Polynomial, reading: _OneStep, values: dict[fx.Node, Tensor]) -> Tensor:
    """A polynomial, computed from the tensors that its leaves are."""

    def matrix(leaf: int, transposed: bool, diagonal: bool) -> Tensor:
        spec = reading.leaves.matrices[leaf]
        if spec.node is None:
            found = torch.ones(int(spec.rows), 1, dtype=torch.float64)
        elif diagonal:
            return torch.diag(values[spec.node].reshape(-1))
        else:
            found = values[spec.node].reshape(int(spec.batch), int(spec.rows), int(spec.cols))
        return found.mT if transposed else found

    words = []
    for word, c in p.terms:
        found = torch.tensor([[c]], dtype=torch.float64)
        for scalar in word.scalars:
            leaf = reading.leaves.scalars[scalar]
            by = values[leaf.node].reshape(())
            found = found / by if leaf.inverse else found * by
        for i, factor in enumerate(word.factors):
            found = found * matrix(*factor) if i == 0 else found @ matrix(*factor)
        words.append(torch.diagonal(found, dim1=-2, dim2=-1) if word.diag_part else found)
    result = words[0]
    for word_value in words[1:]:
        result = result + word_value
    return result


def _x(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], Cut]] = {
    "mm": (aten.mm.default, (_x(4, 3), _x(3, 5)), {}, Cut(0, 1)),
    "bmm": (aten.bmm.default, (_x(2, 4, 3), _x(2, 3, 5)), {}, Cut(1, 2)),
    "linear": (aten.linear.default, (_x(2, 4, 3), _x(5, 3), _x(5)), {}, Cut(0, 2)),
    "addmm": (
        aten.addmm.default,
        (_x(5), _x(4, 3), _x(3, 5)),
        {"alpha": 2, "beta": 3},
        Cut(0, 1),
    ),
    "addmm onto a column": (
        aten.addmm.default,
        (_x(4, 1), _x(4, 3), _x(3, 5)),
        {},
        Cut(0, 1),
    ),
    "add": (aten.add.Tensor, (_x(4, 5), _x(4, 5)), {"alpha": 2}, Cut(0, 1)),
    "add a row": (aten.add.Tensor, (_x(2, 4, 5), _x(5)), {}, Cut(0, 2)),
    "sub a column": (aten.sub.Tensor, (_x(4, 5), _x(4, 1)), {}, Cut(0, 1)),
    "neg": (aten.neg.default, (_x(4, 5),), {}, Cut(0, 1)),
    "scaled by a number": (aten.mul.Tensor, (_x(4, 5), 3.0), {}, Cut(0, 1)),
    "scaled by a tensor": (aten.mul.Tensor, (_x(4, 5), _x(1)), {}, Cut(0, 1)),
    "divided by a tensor": (aten.div.Tensor, (_x(4, 5), _x()), {}, Cut(0, 1)),
    "columns scaled": (aten.mul.Tensor, (_x(2, 4, 5), _x(5)), {}, Cut(0, 2)),
    "rows scaled": (aten.mul.Tensor, (_x(2, 4, 5), _x(2, 4, 1)), {}, Cut(0, 2)),
    "view": (aten.view.default, (_x(2, 4, 5), [8, 5]), {}, Cut(0, 1)),
    "permute": (aten.permute.default, (_x(2, 4, 5), [2, 0, 1]), {}, Cut(0, 1)),
    "batched transpose": (aten.transpose.int, (_x(2, 4, 5), 1, 2), {}, Cut(1, 2)),
    "clone": (aten.clone.default, (_x(4, 5),), {}, Cut(0, 1)),
    "rows multiplied": (aten.einsum.default, ("ij,ij->i", [_x(4, 5), _x(4, 5)]), {}, Cut(0, 1)),
    "columns multiplied": (aten.einsum.default, ("ij,ij->j", [_x(4, 5), _x(4, 5)]), {}, Cut(0, 0)),
    "einsum": (aten.einsum.default, ("bti,oi->bto", [_x(2, 4, 3), _x(5, 3)]), {}, Cut(0, 2)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_form_computes_what_its_operator_does(name: str) -> None:
    target, args, kwargs, cut = CALLS[name]
    reading, node, values = _read(target, *args, **kwargs)
    addends = reading.as_addends(node, cut)
    assert addends is not None
    found = _value(total(addends), reading, values)
    torch.testing.assert_close(found.reshape(-1), node.meta["val"].reshape(-1))
    shown = cut.extents(shape_of(node))
    if not total(addends).is_diag_part:
        assert tuple(found.shape[-2:]) == shown[1:]


@pytest.mark.parametrize("rows", [True, False])
def test_a_total_is_a_product_with_ones(rows: bool) -> None:
    graph = fx.Graph()
    x, node = graph.placeholder("x"), graph.placeholder("total")
    x.meta["val"] = _x(4, 5)
    node.meta["val"] = x.meta["val"].sum(0 if rows else 1, keepdim=True)
    reading = _OneStep(ValueNumbers(graph, Effects(graph)), Leaves(), {node: forms.Total(x, rows)})
    for cut in (Cut(0, 1), Cut(0, 0), Cut(0, 2)):
        addends = reading.as_addends(node, cut)
        if addends is None:
            continue
        found = _value(total(addends), reading, {x: x.meta["val"]})
        assert tuple(found.shape[-2:]) == cut.extents(shape_of(node))[1:]
        torch.testing.assert_close(found.reshape(-1), node.meta["val"].reshape(-1))


@dataclass(frozen=True)
class _Dequantised:
    """The origin of a weight that exists only inside an operator."""

    packed: fx.Node

    node: ClassVar[None] = None
    dtype: ClassVar[torch.dtype] = torch.float64

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        return (self.packed,)

    def key(self, numbers: Numbers) -> Hashable:
        return numbers.of(self.packed)

    def write(self, writer: LeafWriter) -> fx.Node:
        return writer.call(aten.to.dtype, self.packed, torch.float64)


def test_a_leaf_may_be_held_by_no_node() -> None:
    """Equal origins are one leaf; what is written for it is read back as that leaf."""
    graph = fx.Graph()
    packed, written = graph.placeholder("packed"), graph.placeholder("written")
    packed.meta["val"], written.meta["val"] = torch.ones(4, 5, dtype=torch.int8), _x(4, 5)
    form = forms.Written(_Dequantised(packed))
    reading = _OneStep(ValueNumbers(graph, Effects(graph)), Leaves(), {written: form})
    leaf = reading.virtual(_Dequantised(packed), 4, 5)
    assert reading.virtual(_Dequantised(packed), 4, 5) == leaf
    assert reading.as_addends(written, Cut(0, 1)) == (leaf,)
    assert reading.as_addends(written, Cut(0, 2)) is None
    (spec,) = reading.leaves.matrices
    assert (spec.node, spec.sources, spec.origin.dtype) == (None, (packed,), torch.float64)
