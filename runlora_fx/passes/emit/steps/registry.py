"""Registry: the function that writes the steps of an implementation, by its name.

    @writes("total")
    def write(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node: ...

Invariant: a function writes the operations that its implementation was priced for.
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
    """The tools that a function needs to write a step.

    Attributes:
        scope: The task, the writer and the leaves.
        values: Returns the nodes of operands, and emits an operand when it is first asked for.
        products: Writes products of two matrices.
        sums: Writes sums.
        broadcasts: Writes repeated rows and columns.
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
    """Register the function that writes the steps of an implementation.

    Raises:
        ValueError: If the implementation has one already.
    """
    if name in _WRITERS:
        raise ValueError(f"{name!r} is written already")

    def registered(write: Write) -> Write:
        _WRITERS[name] = write
        return write

    return registered


def writing(name: str) -> Write:
    """The function that writes the steps of an implementation.

    Raises:
        EmissionError: If there is none.
    """
    found = _WRITERS.get(name)
    if found is None:
        raise EmissionError(f"nothing writes the implementation {name!r}")
    return found
