"""Orientation: whether each value of a plan is computed as it is or as its transpose.

Example: a root of shape (o, i) that is ``dY' X`` is computed so, and not as ``(X' dY)'``.

A value that a root shows, maybe added up or scaled elementwise, is computed as the root lies in
memory. Any other is computed in the orientation in which its largest leaf stands untransposed: an
activation computed transposed would drag transposed layouts through whatever reads it.

Invariant: the choice depends on the plan and the roots alone, not on what is written first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from runlora_fx.passes.algebra.plan import Keep, Product, Step, Sum, Value
from runlora_fx.passes.algebra.polynomials import Factor, Polynomial, normalise
from runlora_fx.passes.levels.sizes import is_column_major
from runlora_fx.passes.read.regions import Root

#: The value of a normalised polynomial in a phase.
ValueOf: TypeAlias = Callable[[Polynomial, bool], Value]


def orientations(
    steps: Mapping[Value, Step], roots: Iterable[Root], value_of: ValueOf
) -> dict[Value, bool]:
    """By value that a root shows, whether it is computed transposed.

    Args:
        steps: How every value is computed.
        roots: What is emitted. Of two that show one value, the first decides.
        value_of: The value of a normalised polynomial in a phase.
    """
    found: dict[Value, bool] = {}
    for root in roots:
        flip = is_column_major(root.node)
        pending = [(part, root.backward, flip) for part in root.parts]
        while pending:
            part, backward, turned = pending.pop()
            _, transposed, core = normalise(part)
            value = value_of(core, backward)
            if value in found or core.leaf is not None:
                continue
            found[value] = transposed != turned
            step = steps.get(value)
            if step is None or isinstance(step, Keep):
                value = Value(core, False)
                found.setdefault(value, transposed != turned)
                step = steps.get(value)
            below = elementwise_operands(step, value.core)
            pending += [(p, value.backward, transposed != turned) for p in below]
    return found


def elementwise_operands(step: Step | None, core: Polynomial) -> tuple[Polynomial, ...]:
    """The operands that lie in memory as the result of a step does: those of sums and scalings."""
    match step:
        case Sum(parts):
            return parts
        case Product(left, right) if not core.is_dots and left.is_diagonal != right.is_diagonal:
            return (right,) if left.is_diagonal else (left,)
    return ()


def stands_transposed(core: Polynomial, size: Callable[[Factor], int]) -> bool:
    """Whether the largest leaf of a value is transposed in it.

    Args:
        core: The value.
        size: The size of a leaf [elements].
    """
    factors = (f for word in core.words for f in word.without_diagonals)
    return max(factors, key=size).transposed
