"""The problem that one LoRA layer poses, with its gradients, as autograd computes them.

    Y = X W' + 2 (X A') B'        dB = 2 dY' (X A'), dA = 2 (dY B)' X, dX = dY W + 2 (dY B) A

The scaling is 2, which is common: alpha is twice the rank.

Invariant: it is the very problem that the pass reads from a traced ``nn.Linear`` with an adapter.
"""

from __future__ import annotations

from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar, leaf, normalise
from runlora_fx.passes.algebra.problem import LeafSpec, Problem, Value
from runlora_fx.passes.algebra.steps import Keep, Step, Sum, product_step

#: The leaves: input, weight, adapter, and the gradient of the result.
X, W, A, B, DY = range(5)

#: The dimensions: tokens, inputs, outputs, rank.
TOKENS, INPUTS, OUTPUTS, RANK = range(4)

SCALING = Scalar(2.0)


def lora_problem(
    tokens: int, inputs: int, outputs: int, rank: int, *, dtype: str, itemsize: int
) -> Problem:
    """The problem of a layer in a training step.

    Args:
        tokens: Rows of X.
        inputs: Columns of X.
        outputs: Columns of Y.
        rank: Of the adapter.
        dtype: Of all matrices, as torch names it.
        itemsize: Element width [B].
    """
    x, w, a, b, dy = map(leaf, range(5))
    down, base, update = x @ a.T, x @ w.T, x @ a.T @ b.T
    back, through_base, through_update = dy @ b, dy @ w, dy @ b @ a
    y, dx = base + update.scaled(SCALING), through_base + through_update.scaled(SCALING)
    da, db = back.T @ x, dy.T @ down
    steps: tuple[tuple[Polynomial, bool, Step], ...] = (
        (base, False, product_step(x, w.T)),
        (down, False, product_step(x, a.T)),
        (update, False, product_step(down, b.T)),
        (y, False, _sum(base, update.scaled(SCALING))),
        (db, True, product_step(dy.T, down)),
        (back, True, product_step(dy, b)),
        (da, True, product_step(back.T, x)),
        (through_update, True, product_step(back, a)),
        (through_base, True, product_step(dy, w)),
        (dx, True, _sum(through_update.scaled(SCALING), through_base)),
    )
    kept = normalise(down).core
    return Problem(
        leaves=(
            LeafSpec(TOKENS, INPUTS),
            LeafSpec(OUTPUTS, INPUTS),
            LeafSpec(RANK, INPUTS),
            LeafSpec(OUTPUTS, RANK),
            LeafSpec(TOKENS, OUTPUTS, backward=True),
        ),
        dims=(tokens, inputs, outputs, rank),
        demands=tuple(Value(normalise(p).core, DY in p.leaves) for p in (y, db, da, dx)),
        incoming=(
            *((Value(normalise(p).core, late), step) for p, late, step in steps),
            (Value(kept, True), Keep()),
        ),
        kept=frozenset([kept]),
        itemsize=itemsize,
        dtype=dtype,
        shown=tuple((normalise(p).core, normalise(p).transposed) for p in (y, db, da, dx)),
        scaled=((normalise(dy).core, True),),
    )


def _sum(*parts: Polynomial) -> Step:
    """The sum of some parts, as a step that makes its normalised value."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return Sum(parts).making(total)
