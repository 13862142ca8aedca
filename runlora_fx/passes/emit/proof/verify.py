"""Verification: an emitted root is read back, and its polynomial must equal that of the old root.

    addmm(w, b, a), permute, mm      ->      X W' + X A' B', which is what the old root was read as

One value can appear in a polynomial in two ways: a root is a leaf of its readers, but an equal node
that is no root is read through. So such leaves are replaced by their own polynomials first.

Invariant: a root that passes computes the same as the old one, for all values of the leaves.
"""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.algebra.addends import Addends, total
from runlora_fx.passes.algebra.images import is_fold
from runlora_fx.passes.algebra.polynomials import Polynomial, of_factors, polynomial
from runlora_fx.passes.algebra.replacement import replaced
from runlora_fx.passes.algebra.words import Factor, NotInNormalForm
from runlora_fx.passes.emit.nodes.layout import is_relied_on
from runlora_fx.passes.levels.cuts import Cut
from runlora_fx.passes.levels.sizes import (
    example_of,
    same_shape,
    same_strides,
    shape_of,
    strides_of,
)
from runlora_fx.passes.read.polynomial_reader import PolynomialReader
from runlora_fx.passes.read.reader import GraphReader


class VerificationError(RuntimeError):
    """An emitted root does not compute the old root: a bug of this package."""


class _Unreadable(Exception):
    """A node that has no readable form and is no leaf of the expected polynomial."""


class _ReadBack(PolynomialReader):
    """Reads nodes down to the leaves of the expected polynomial, also through roots."""

    def __init__(self, reader: GraphReader, leaves: frozenset[int]) -> None:
        super().__init__(reader.values, reader.leaves, reader.forms)
        expected = [reader.leaves.matrices[leaf] for leaf in leaves]
        bases = {leaf.picked.base for leaf in expected if leaf.picked is not None}
        kernels = {leaf.kernel_of for leaf in expected if leaf.kernel_of is not None}
        self._expected = leaves | bases | kernels

    def operand(self, node: fx.Node, cut: Cut) -> Addends:
        factor = self.leaves.find(self.values, node, cut)
        if factor is not None and factor.leaf in self._expected:
            return (of_factors((factor,)),)
        below = self.as_addends(node, cut)
        if below is None:
            raise _Unreadable(node.name)
        return below


def verify(reader: GraphReader, emitted: fx.Node, root: fx.Node, expected: Polynomial) -> None:
    """Prove that a node computes a polynomial, with the shape, dtype, device and strides of a root.

    Strides are compared only if a reader of the root relies on them.

    Raises:
        VerificationError: If it does not. The message says what differs.
    """
    new, old = example_of(emitted), example_of(root)
    assert new is not None and old is not None
    is_alike = same_shape(shape_of(emitted), shape_of(root))
    if not is_alike or new.dtype != old.dtype or new.device != old.device:
        raise VerificationError(f"{root.name}: emitted {new!r} in the place of {old!r}")
    if not same_strides(emitted, root) and is_relied_on(root):
        raise VerificationError(
            f"{root.name}: emitted with strides {strides_of(emitted)}, came with {strides_of(root)}"
        )
    expected = _written_out(reader, expected)
    try:
        found = total(_ReadBack(reader, expected.leaves).operand(emitted, reader.cuts[root]))
    except (_Unreadable, NotInNormalForm) as error:
        raise VerificationError(f"{root.name}: cannot read {error} back") from error
    found, expected = _without_kernels(reader, found), _without_kernels(reader, expected)
    if not found.unmirrored.close_to(expected.unmirrored):
        raise VerificationError(f"{root.name}: emitted {found}, expected {expected}")


def _without_kernels(reader: GraphReader, p: Polynomial) -> Polynomial:
    """A polynomial with kernels of convolutions as plain matrices, but for those that make folds.

    A matrix is the same tensor, whatever it multiplies. Folds depend on the geometry.
    """
    leaves = reader.leaves.matrices
    if all(leaves[leaf].kernel_of is None for leaf in p.leaves):
        return p

    def bare(factor: Factor) -> Factor:
        base = leaves[factor.leaf].kernel_of
        return factor if base is None else factor._replace(leaf=base)

    terms = []
    for word, number in p.terms:
        alone = Polynomial(((word, number),))
        if not (is_fold(leaves, alone) or is_fold(leaves, alone.T)):
            word = word._replace(factors=tuple([bare(factor) for factor in word.factors]))
        terms.append((word, number))
    return polynomial(terms)


def _written_out(reader: GraphReader, p: Polynomial) -> Polynomial:
    """A polynomial without leaves that equal a node which is read through."""
    while True:
        twins = {leaf: twin for leaf in p.leaves for twin in [_twin(reader, leaf)] if twin}
        if not twins:
            return p
        p = replaced(p, twins)


def _twin(reader: GraphReader, leaf: int) -> Polynomial | None:
    """The polynomial of a leaf, if an equal node is read through; None if there is no such node."""
    held = reader.leaves.matrices[leaf].node
    for node in () if held is None else reader.values.equals(held):
        if node not in reader.cuts or node in reader.stops:
            continue
        factor = reader.leaves.find(reader.values, node, reader.cuts[node])
        if factor is not None and factor.leaf == leaf:
            found = reader.expression(node)
            return found.T if factor.transposed else found
    return None
