"""Costs: an operation costs an amount of each term, such as FLOPs, bytes read, or launches.

Example: a product (512, 768) @ (768, 16) in fp32 whose right operand lies transposed costs ::

    {"flops.nt": 12582912, "read": 1622016, "written": 32768, "launches": 1}

A profile has the time of one unit of each term (:mod:`runlora_fx.cost_model.profile`). The
predicted time of an operation is the sum of amount times time. A new term is one line of
:data:`TERMS`. Then operations may use it, calibration fits it, and files store it.

Invariant: a cost contains no time and no property of a machine.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import sympy

#: A dimension or an amount: an integer, or an expression if shapes are symbolic.
Amount: TypeAlias = int | sympy.Expr

#: The totals that reports show.
Total: TypeAlias = Literal["flops", "bytes", "kernels", "saved"]


@dataclass(frozen=True)
class Term:
    """One kind of cost.

    Attributes:
        name: Its key in costs and profiles.
        total: The total of the report that it counts towards, if any.
        meaning: What one unit of it is.
        like: The term whose time it has if a profile has no time for it; without one it takes no
            time then.
        is_timed: True if a unit takes time. Held memory takes none; the option ``memory`` gives it
            a price.
    """

    name: str
    total: Total | None
    meaning: str
    like: str | None = None
    is_timed: bool = True


#: All terms by name. FLOPs are those of contractions in the profile's dtype, a multiply-add counted
#: as two. The FLOPs of elementwise arithmetic are not counted: its time is that of the bytes it
#: moves.
TERMS: dict[str, Term] = {
    term.name: term
    for term in (
        Term("flops.nn", "flops", "FLOP where both operands lie as they are read"),
        Term("flops.nt", "flops", "FLOP where the right one lies transposed: X W'", "flops.nn"),
        Term("flops.tn", "flops", "FLOP where the left one lies transposed: dY' X", "flops.nn"),
        Term("flops.upcast", "flops", "FLOP in float32, of 16-bit operands", "flops.nn"),
        Term("read", "bytes", "B of an operand of a product"),
        Term("written", "bytes", "B of the result of a product", "read"),
        Term("elementwise", "bytes", "B moved by arithmetic that is fused into others", "written"),
        Term("picked", "bytes", "B read and written to pick products' operands", "elementwise"),
        Term("special", None, "element of a function such as exp, beyond the bytes that it moves"),
        Term("random", None, "random number, beyond the bytes that it moves"),
        Term("launches", "kernels", "kernel"),
        Term("held", "saved", "B kept from the forward to the backward", is_timed=False),
    )
}


class Cost(Mapping[str, Amount]):
    """Amounts by term: an immutable mapping that can be added and scaled.

    A term that is not in it has the amount 0.
    """

    __slots__ = ("_amounts",)

    def __init__(self, amounts: Mapping[str, Amount]) -> None:
        """Take amounts by the names of terms. The mapping must not be changed afterwards."""
        self._amounts = amounts

    def __getitem__(self, term: str) -> Amount:
        return self._amounts.get(term, 0)

    def __contains__(self, term: object) -> bool:
        return term in self._amounts

    def __iter__(self) -> Iterator[str]:
        return iter(self._amounts)

    def __len__(self) -> int:
        return len(self._amounts)

    def items(self) -> ItemsView[str, Amount]:
        """The terms and their amounts. Written by hand, because the search calls it most often."""
        return self._amounts.items()

    def __add__(self, other: Cost) -> Cost:
        total = dict(self._amounts)
        for term, amount in other.items():
            total[term] = total[term] + amount if term in total else amount
        return Cost(total)

    def __mul__(self, times: Amount) -> Cost:
        return Cost({term: amount * times for term, amount in self.items()})

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cost) and self._mentioned == other._mentioned

    def __hash__(self) -> int:
        return hash(frozenset(self._mentioned.items()))

    def __repr__(self) -> str:
        return f"Cost({self._amounts})"

    @property
    def flops(self) -> Amount:
        """Floating-point operations of contractions, a multiply-add counted as two [FLOP]."""
        return self._total("flops")

    @property
    def bytes(self) -> Amount:
        """Memory read and written [B]."""
        return self._total("bytes")

    @property
    def kernels(self) -> Amount:
        """Kernels that are launched."""
        return self._total("kernels")

    @property
    def saved(self) -> Amount:
        """Memory held from the forward to the backward [B]."""
        return self._total("saved")

    @property
    def _mentioned(self) -> dict[str, Amount]:
        return {term: amount for term, amount in self._amounts.items() if amount != 0}

    def _total(self, total: Total) -> Amount:
        return sum(amount for term, amount in self.items() if TERMS[term].total == total)


FREE = Cost({})
