"""What a machine can do: the coefficients that turn an operation into seconds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import log2
from typing import TypeAlias

import sympy

from runlora_fx.cost_model.ops import Add, GemmShape, Hold, MatMul, Operation

#: Seconds: a number, or an expression in the graph's symbols.
Seconds: TypeAlias = float | sympy.Expr


#: How many measured products correct a prediction, and how much the uncorrected one weighs.
_NEIGHBOURS = 6
_PRIOR_WEIGHT = 1 / 16


@dataclass(frozen=True)
class MachineProfile:
    """Sustained rates of one device for one dtype, and the products measured on it.

    A product takes ``FLOPs / flops_per_s + bytes read / read_bytes_per_s + bytes written /
    write_bytes_per_s + launch_s``. The sum lets the rate fall off smoothly where a dimension is
    small: with outputs of few columns the operands dominate, with a short inner dimension the
    result does. Where products of about the same shape and the same layout were measured, the
    formula is corrected by what it was wrong about them; a product that was itself measured takes
    the time it took.

    Attributes:
        flops_per_s: Rate of a large matrix product [FLOP/s].
        read_bytes_per_s: Rate at which the operands of a product are read [B/s].
        write_bytes_per_s: Rate at which the result of a product is written [B/s].
        add_bytes_per_s: Rate of fused elementwise arithmetic [B/s].
        launch_s: Fixed cost of a kernel [s].
        measured: Times of products [s].
    """

    flops_per_s: float = 1.5e11
    read_bytes_per_s: float = 3e10
    write_bytes_per_s: float = 1.5e10
    add_bytes_per_s: float = 1.5e10
    launch_s: float = 3e-6
    measured: tuple[tuple[GemmShape, float], ...] = ()

    def seconds(self, operation: Operation) -> float:
        """The time of an operation of known size [s]: predicted, corrected by measurements."""
        predicted = float(self.formula(operation))
        if not self.measured or not isinstance(operation, MatMul):
            return predicted
        return predicted * self._correction(operation)

    def formula(self, operation: Operation) -> Seconds:
        """The time of an operation as the rates give it; symbolic if its dimensions are [s]."""
        match operation:
            case MatMul():
                return (
                    operation.cost.flops / self.flops_per_s
                    + operation.read / self.read_bytes_per_s
                    + operation.written / self.write_bytes_per_s
                    + self.launch_s
                )
            case Add():
                return operation.cost.bytes / self.add_bytes_per_s
            case Hold():
                return 0.0

    def _correction(self, product: MatMul) -> float:
        """Measured over predicted time, in the neighbourhood of a product."""
        shape = product.shape
        if (known := self._corrections.get(shape)) is None:
            known = self._corrections[shape] = self._interpolated(shape, product.itemsize)
        return known

    def _interpolated(self, shape: GemmShape, itemsize: int) -> float:
        """The geometric mean of the nearest ratios, weighted by inverse squared log distance."""
        near: list[tuple[float, float]] = []
        for other, seconds in self.measured:
            if other[4:] == shape[4:]:
                distance = sum(log2(x / y) ** 2 for x, y in zip(other[:4], shape[:4], strict=True))
                ratio = seconds / float(self.formula(MatMul(*other[:4], itemsize)))
                if distance == 0:
                    return ratio
                near.append((distance, log2(ratio)))
        near = sorted(near)[:_NEIGHBOURS]
        weight = sum(1 / distance for distance, _ in near) + _PRIOR_WEIGHT
        return float(2 ** (sum(ratio / distance for distance, ratio in near) / weight))

    @cached_property
    def _corrections(self) -> dict[GemmShape, float]:
        return {}

    @cached_property
    def _hash(self) -> int:
        rates = (self.flops_per_s, self.read_bytes_per_s, self.write_bytes_per_s)
        return hash((*rates, self.add_bytes_per_s, self.launch_s, self.measured))

    def __hash__(self) -> int:
        return self._hash


#: A few cores of a current CPU in fp32; a ratio of FLOPs to bytes that most machines resemble.
DEFAULT_PROFILE = MachineProfile()
