"""The registry of what writes steps: by the name of an implementation, a function.

    @writes("total")
    def write(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node: ...

Invariant: a function writes what its implementation was priced for. It decides nothing about the
algebra.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Step
from runlora_fx.passes.emit.nodes.node_writer import EmissionError
from runlora_fx.passes.emit.steps.broadcasts import Broadcasts
from runlora_fx.passes.emit.steps.products import Products
from runlora_fx.passes.emit.steps.scope import Scope
from runlora_fx.passes.emit.steps.sums import Sums
from runlora_fx.passes.emit.steps.values import Values


@dataclass(frozen=True)
class Emission:
    """What a step is written with.

    Attributes:
        scope: The task, where to write, and the leaves.
        values: Operands, each written when it is first asked for.
        products: Products of two matrices.
        sums: Sums.
        broadcasts: Rows and columns that are repeated.
    """

    scope: Scope
    values: Values
    products: Products
    sums: Sums
    broadcasts: Broadcasts


#: Writes a value, or its transpose, by a step; returns the node that holds it.
Write: TypeAlias = Callable[[Emission, Value, Step, bool], fx.Node]

_WRITERS: dict[str, Write] = {}


def writes(name: str) -> Callable[[Write], Write]:
    """Register a function as what writes the steps that an implementation runs.

    Raises:
        ValueError: If there is one already.
    """
    if name in _WRITERS:
        raise ValueError(f"{name!r} is written already")

    def registered(write: Write) -> Write:
        _WRITERS[name] = write
        return write

    return registered


def writing(name: str) -> Write:
    """What writes the steps that an implementation runs.

    Raises:
        EmissionError: If nothing does.
    """
    found = _WRITERS.get(name)
    if found is None:
        raise EmissionError(f"nothing writes the implementation {name!r}")
    return found
