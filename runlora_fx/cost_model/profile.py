"""What a machine can do: the coefficients that turn an operation into seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import sympy

from runlora_fx.cost_model.ops import Add, Dots, GemmShape, Hold, MatMul, Operation, Stretch

#: Seconds: a number, or an expression in the graph's symbols.
Seconds: TypeAlias = float | sympy.Expr


@dataclass(frozen=True)
class MachineProfile:
    """Sustained rates of one device for one dtype, and the products measured on it.

    A product takes ``FLOPs * slower / flops_per_s + bytes read / read_bytes_per_s + bytes written /
    write_bytes_per_s + launch_s``, where ``slower`` depends on how the operands lie. The sum lets
    the rate fall off smoothly where a dimension is small: with outputs of few columns the operands
    dominate, with a short inner dimension the result does. A product that was itself measured takes
    the time it took. (Correcting the formula by products of about the same shape was tried: it
    carries the noise of single measurements over to others, and chose worse plans than the formula
    alone.)

    Attributes:
        flops_per_s: Rate of a large matrix product in its fastest layout [FLOP/s].
        read_bytes_per_s: Rate at which the operands of a product are read [B/s].
        write_bytes_per_s: Rate at which the result of a product is written [B/s].
        add_bytes_per_s: Rate of fused elementwise arithmetic [B/s].
        launch_s: Fixed cost of a kernel [s].
        slower_nn: How many times as long a FLOP takes where both operands lie as they are read.
        slower_nt: The same where the right operand lies transposed, as in ``X W'``.
        slower_tn: The same where the left operand lies transposed, as in ``dY' X``.
        measured: Times of products [s].
    """

    flops_per_s: float = 1.5e11
    read_bytes_per_s: float = 3e10
    write_bytes_per_s: float = 1.5e10
    add_bytes_per_s: float = 1.5e10
    launch_s: float = 3e-6
    slower_nn: float = 1.0
    slower_nt: float = 1.0
    slower_tn: float = 1.0
    measured: tuple[tuple[GemmShape, float], ...] = ()

    def seconds(self, operation: Operation) -> float:
        """The time of an operation of known size [s], measured if it was and predicted if not."""
        if self.measured and isinstance(operation, MatMul):
            known = self._times.get(operation.shape)
            if known is not None:
                return known
        return float(self.formula(operation))

    def formula(self, operation: Operation) -> Seconds:
        """The time of an operation as the rates give it; symbolic if its dimensions are [s]."""
        match operation:
            case MatMul():
                slower: float = getattr(self, f"slower_{operation.layout}")
                return (
                    operation.cost.flops * (slower / self.flops_per_s)
                    + operation.read / self.read_bytes_per_s
                    + operation.written / self.write_bytes_per_s
                    + self.launch_s
                )
            case Add() | Stretch() | Dots():
                return operation.cost.bytes / self.add_bytes_per_s
            case Hold():
                return 0.0

    @cached_property
    def _times(self) -> Mapping[GemmShape, float]:
        return dict(self.measured)

    @cached_property
    def _hash(self) -> int:
        rates = (self.flops_per_s, self.read_bytes_per_s, self.write_bytes_per_s)
        slower = (self.slower_nn, self.slower_nt, self.slower_tn)
        return hash((*rates, self.add_bytes_per_s, self.launch_s, *slower, self.measured))

    def __hash__(self) -> int:
        return self._hash


#: A few cores of a current CPU in fp32; a ratio of FLOPs to bytes that most machines resemble.
DEFAULT_PROFILE = MachineProfile()
