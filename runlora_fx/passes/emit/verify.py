"""Verification: an emitted root is read back and must have the normal form it was made from."""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.algebra.addends import Addends, total
from runlora_fx.passes.algebra.polynomials import Polynomial, of_factors
from runlora_fx.passes.algebra.words import NotInNormalForm
from runlora_fx.passes.emit.layout import is_relied_on
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
    """An emitted root is not what it was to be: a bug of ours."""


class _Unreadable(Exception):
    """A node that is neither readable nor a leaf of the polynomial to prove."""


class _ReadBack(PolynomialReader):
    """Reads down to the leaves of one polynomial, through roots and interior nodes alike."""

    def __init__(self, reader: GraphReader, expected: Polynomial) -> None:
        super().__init__(reader.values, reader.leaves, reader.forms)
        picked = (reader.leaves.matrices[leaf].picked for leaf in expected.leaves)
        bases = {of.base for of in picked if of is not None}
        self._expected = expected.leaves | bases

    def operand(self, node: fx.Node, cut: Cut) -> Addends:
        factor = self.leaves.find(self.values, node, cut)
        if factor is not None and factor.leaf in self._expected:
            return (of_factors((factor,)),)
        below = self.as_addends(node, cut)
        if below is None:
            raise _Unreadable(node.name)
        return below


def verify(reader: GraphReader, emitted: fx.Node, root: fx.Node, expected: Polynomial) -> None:
    """Prove that a node computes a polynomial, as a tensor like the root's.

    Raises:
        VerificationError: If it does not; the message names both.
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
    try:
        found = total(_ReadBack(reader, expected).operand(emitted, reader.cuts[root]))
    except (_Unreadable, NotInNormalForm) as error:
        raise VerificationError(f"{root.name}: cannot read {error} back") from error
    if not found.unmirrored.close_to(expected.unmirrored):
        raise VerificationError(f"{root.name}: emitted {found}, expected {expected}")
