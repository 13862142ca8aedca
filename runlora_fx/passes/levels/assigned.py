"""Assignments in a graph: what gives each token an expert, and rows that are picked by it.

Example: in ``index(w, [k])`` the node ``k`` assigns an expert to each token, in
``_grouped_mm(x, w, offs)`` the node ``offs`` does. Of the latter no node holds ``w[k]``.

Invariant: two assignments are one if they are of one kind and their nodes hold equal values.
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
    """What assigns tokens to experts.

    Attributes:
        kind: How the operators that read it multiply: ``"indexed"`` by picked rows, ``"aten"`` and
            ``"transformers"`` by a grouped product of that library.
        node: The index, a number for each token; or the offsets, where the rows of each expert end.
        tokens: Tokens.
        experts: Experts.
        multiple: Widths that grouped products take are multiples of it [elements].
    """

    kind: Literal["indexed", "aten", "transformers"]
    node: fx.Node
    tokens: Dim
    experts: Dim
    multiple: int = 1

    def key(self, numbers: Numbers) -> Hashable:
        """What identifies it."""
        return TokenAssignment, self.kind, numbers.of(self.node), self.tokens, self.experts


@dataclass(frozen=True)
class PickedRows:
    """The matrices of the tokens' experts, picked from those of all experts."""

    base: Origin
    assignment: TokenAssignment

    node: ClassVar[None] = None

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """Those of what is picked from."""
        return self.base.sources

    @property
    def dtype(self) -> torch.dtype | None:
        """That of what is picked from."""
        return self.base.dtype

    @property
    def name(self) -> str:
        """As ``primals_2[primals_5]``."""
        return f"{self.base.name}[{self.assignment.node.name}]"

    def key(self, numbers: Numbers) -> Hashable:
        """What is picked from, and by what."""
        return PickedRows, self.base.key(numbers), self.assignment.key(numbers)

    def write(self, writer: LeafWriter) -> fx.Node:
        """The picked rows."""
        return writer.call(_aten.index.Tensor, self.base.write(writer), [self.assignment.node])
