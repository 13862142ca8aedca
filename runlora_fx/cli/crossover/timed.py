"""Timed plans: the products of all plans are run on this machine, at a few numbers of tokens.

    Timed(tokens=1024, rank=16, seconds={"A": 0.0123, "B": 0.0119}, predicted="B")

Invariant: a time is that of real products. Sums are fused into other kernels by Inductor, so their
predicted times are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from runlora_fx.cli.crossover.contenders import Contender, winners
from runlora_fx.cli.crossover.fields import Field
from runlora_fx.cost_model.devices.measure import matmul_seconds, undisturbed
from runlora_fx.cost_model.ops import GemmShape, MatMul, Operation
from runlora_fx.passes.algebra.plan import incoming_operations

#: Numbers of tokens are left out if the incoming graph is predicted to take longer [s].
_LONGEST_S = 0.5

#: How many numbers of tokens are measured, and how often each product, in turn.
_POINTS, _ROUNDS = 4, 3

Track = Callable[[Sequence[GemmShape], str], Iterable[GemmShape]]


@dataclass(frozen=True)
class Timed:
    """The times of all plans for one number of tokens.

    Attributes:
        tokens: The number of tokens.
        rank: The rank.
        seconds: By letter, the time of the plan [s].
        predicted: The letter of the plan that the field predicts to win.
    """

    tokens: int
    rank: int
    seconds: dict[str, float]
    predicted: str

    @property
    def fastest(self) -> str:
        """The letter of the plan that took least."""
        return min(self.seconds, key=self.seconds.__getitem__)


def timed(
    field: Field, known: Sequence[Contender], rank: int, device: torch.device, track: Track
) -> list[Timed]:
    """Measure the plans of a field.

    Args:
        field: A field of this machine, by time.
        known: The plans.
        rank: The rank.
        device: The device to measure.
        track: Shows the progress.

    Raises:
        ValueError: If even the fewest tokens take too long.
    """
    objective = field.basis.objective
    sizes = [
        size
        for size in field.tokens
        if objective.total(incoming_operations(field.layer.problem(size, rank))) <= _LONGEST_S
    ]
    if not sizes:
        raise ValueError(
            f"--measure: a step of this layer is predicted to take more than {_LONGEST_S} s"
        )
    points = sorted(sizes[:: -max(1, len(sizes) // _POINTS)][:_POINTS])
    operations = {
        (size, contender.letter): _operations(field, contender, size, rank)
        for size in points
        for contender in known
    }
    shapes = list(
        dict.fromkeys(
            one.shape for of in operations.values() for one in of if isinstance(one, MatMul)
        )
    )
    times: dict[GemmShape, list[float]] = {shape: [] for shape in shapes}
    dtype = getattr(torch, field.layer.dtype)
    with undisturbed(device):
        for i in range(_ROUNDS):
            for shape in track(shapes, f"products, round {i + 1} of {_ROUNDS}"):
                times[shape].append(matmul_seconds(shape, dtype, device))
    medians = tuple((shape, median(found)) for shape, found in times.items())
    measured = replace(objective, profile=replace(objective.profile, measured=medians))
    letters = winners(field, known)[field.ranks.index(rank)]
    return [
        Timed(
            size,
            rank,
            {c.letter: float(measured.total(operations[size, c.letter])) for c in known},
            letters[field.tokens.index(size)],
        )
        for size in points
    ]


def _operations(field: Field, contender: Contender, tokens: int, rank: int) -> list[Operation]:
    problem = field.layer.problem(tokens, rank)
    if contender.plan is None:
        return incoming_operations(problem)
    return contender.plan.operations(problem)
