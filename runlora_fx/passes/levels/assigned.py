"""Assignments in a graph: the node that assigns an expert to each token, and picked matrices.

Example: in ``index(w, [k])`` the node ``k`` assigns an expert to each token. In
``_grouped_mm(x, w, offs)`` the node ``offs`` does, and no node holds ``w[k]``.

Invariant: two assignments are equal if they are of one kind and their nodes hold equal values.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.levels.origins import LeafWriter, Numbers, Origin

_aten = torch.ops.aten


@dataclass(frozen=True)
class TokenAssignment:
    """The assignment of experts to tokens by one node.

    Attributes:
        kind: ``"indexed"`` if matrices are picked by an index; ``"aten"`` or ``"transformers"`` if
            the grouped product of that library multiplies.
        node: The index of each token's expert, or the offsets at which the rows of experts end.
        tokens: The number of tokens.
        experts: The number of experts.
        multiple: Grouped products take widths that are multiples of it [elements].
    """

    kind: Literal["indexed", "aten", "transformers"]
    node: fx.Node
    tokens: Dim
    experts: Dim
    multiple: int = 1

    def key(self, numbers: Numbers) -> Hashable:
        """A key that equal assignments share."""
        return TokenAssignment, self.kind, numbers.of(self.node), self.tokens, self.experts


@dataclass(frozen=True)
class PickedRows:
    """For each token the matrix of its expert, picked from a stack."""

    base: Origin
    assignment: TokenAssignment

    node: ClassVar[None] = None

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The sources of the stack."""
        return self.base.sources

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the stack."""
        return self.base.dtype

    @property
    def name(self) -> str:
        """The stack and the index, as ``primals_2[primals_5]``."""
        return f"{self.base.name}[{self.assignment.node.name}]"

    def key(self, numbers: Numbers) -> Hashable:
        """The keys of the stack and of the assignment."""
        return PickedRows, self.base.key(numbers), self.assignment.key(numbers)

    def write(self, writer: LeafWriter) -> fx.Node:
        """Write the pick."""
        return writer.call(_aten.index.Tensor, self.base.write(writer), [self.assignment.node])
