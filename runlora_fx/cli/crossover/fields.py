"""Fields: for every number of tokens and every rank, the plan that wins.

    field_of(Layer(4096, 4096, "bfloat16"), basis, tokens=(16, 64), ranks=(8,)).decisions[0][1]

Invariant: a winner is the plan that the pass would take for this layer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runlora_fx.cli.crossover.problem import TOKENS, lora_problem
from runlora_fx.cost_model.objective import Objective
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.search.allowance import within_allowance
from runlora_fx.passes.search.decide import Decision, decide
from runlora_fx.passes.search.ranges import break_even
from runlora_fx.passes.search.varying import Varying

_ITEMSIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

#: The least number of tokens, and of the ranks [elements].
_LEAST_TOKENS, _LEAST_RANK, _MOST_RANK = 16, 4, 512


@dataclass(frozen=True)
class Layer:
    """A linear layer with an adapter that trains.

    Attributes:
        inputs: Width of its input [elements].
        outputs: Width of its output [elements].
        dtype: Of all its matrices, as torch names it.
    """

    inputs: int
    outputs: int
    dtype: str

    def __post_init__(self) -> None:
        for option, width in (("--in", self.inputs), ("--out", self.outputs)):
            if width < 1:
                raise ValueError(f"{option} must be at least 1, got {width}")

    def problem(self, tokens: int, rank: int) -> Problem:
        """What the layer computes in a training step."""
        itemsize = _ITEMSIZES[self.dtype]
        return lora_problem(
            tokens, self.inputs, self.outputs, rank, dtype=self.dtype, itemsize=itemsize
        )


@dataclass(frozen=True)
class Basis:
    """What plans are compared by.

    Attributes:
        title: A name, such as ``"time on H100"``.
        source: If it is counted, predicted or measured, and from what.
        objective: The objective.
    """

    title: str
    source: str
    objective: Objective


@dataclass(frozen=True)
class Field:
    """The winners of one layer.

    Attributes:
        layer: The layer.
        basis: What they win by.
        tokens: The numbers of tokens, in order.
        ranks: The ranks, in order.
        decisions: By rank and number of tokens, the decision.
    """

    layer: Layer
    basis: Basis
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    decisions: tuple[tuple[Decision, ...], ...]

    def break_even(self, rank: int) -> str:
        """The numbers of tokens for which merging pays, as the report of such a layer says it."""
        varying = Varying.of(self.layer.problem(1, rank), frozenset([TOKENS]), self.basis.objective)
        return break_even(varying, "N")


def axes(layer: Layer, rank: int, tokens_max: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers of tokens and the ranks of a field.

    Raises:
        ValueError: If the rank or the most tokens are not valid.
    """
    if rank < 1:
        raise ValueError(f"--rank must be at least 1, got {rank}")
    if tokens_max < 2 * _LEAST_TOKENS:
        raise ValueError(f"--tokens-max must be at least {2 * _LEAST_TOKENS}, got {tokens_max}")
    steps = (round(_LEAST_TOKENS * 2 ** (k / 2)) for k in range(60))
    tokens = tuple(size for size in steps if size <= tokens_max)
    most = min(_MOST_RANK, layer.inputs, layer.outputs)
    powers = (_LEAST_RANK << k for k in range(20))
    return tokens, tuple(sorted({rank, *(r for r in powers if r <= most)}))


def field_of(
    layer: Layer,
    basis: Basis,
    tokens: Sequence[int],
    ranks: Sequence[int],
    advance: Callable[[], object] = lambda: None,
) -> Field:
    """Find the winners.

    Args:
        layer: The layer.
        basis: What they win by.
        tokens: The numbers of tokens.
        ranks: The ranks.
        advance: Called after every rank.
    """
    rows = []
    for rank in ranks:
        rows.append(tuple(_decided(layer.problem(size, rank), basis.objective) for size in tokens))
        advance()
    return Field(layer, basis, tuple(tokens), tuple(ranks), tuple(rows))


def _decided(problem: Problem, objective: Objective) -> Decision:
    """What the pass decides."""
    decision = decide(problem, objective)
    if objective.name == "time" and objective.flops_per_saved_byte:
        return within_allowance([problem], [objective], [decision])[0]
    return decision
