"""Random programs of products, views, mutation and modes: rewritten, they compute the same.

A program is a list of steps on a pool of tensors, some of which are views of others or not
contiguous. Every step may read any tensor of the pool and some write to one. All of the pool is
returned, so that every alias counts.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import runlora_fx

N, RANK = 24, 2

# What a step makes of two square tensors, two factors and a vector.
MAKES: dict[str, Callable[..., Any]] = {
    "lora": lambda x, y, a, b, t: x @ y + x @ a @ b,
    "base": lambda x, y, a, b, t: x @ y,
    "update": lambda x, y, a, b, t: x @ a @ b,
    "down and up": lambda x, y, a, b, t: (x @ a) @ (b * 2),
    "add": lambda x, y, a, b, t: x + y,
    "merged": lambda x, y, a, b, t: x @ (y + 0.5 * (a @ b)),
    "scaled": lambda x, y, a, b, t: x * t,
    "stretched product": lambda x, y, a, b, t: (x @ y + x @ a @ b) * t,
    "dots": lambda x, y, a, b, t: x + (x * (y @ a @ b)).sum(1, keepdim=True),
    "transposed": lambda x, y, a, b, t: x.t(),
    "viewed": lambda x, y, a, b, t: x.reshape(4, 6, N).reshape(N, N),
    "contiguous": lambda x, y, a, b, t: x.contiguous(),
    "cloned": lambda x, y, a, b, t: x.clone(),
    "tanh": lambda x, y, a, b, t: torch.tanh(x),
    "doubled": lambda x, y, a, b, t: 2 * x,
    "dropout in eval": lambda x, y, a, b, t: F.dropout(x, 0.5, False),
    "cast": lambda x, y, a, b, t: x.to(torch.float64),
    "dropout": lambda x, y, a, b, t: F.dropout(x, 0.5, True),
    "chunk": lambda x, y, a, b, t: torch.cat(x.chunk(2, 1)[::-1], 1),
}

# What a step writes, and to what.
WRITES: dict[str, Callable[..., Any]] = {
    "add_": lambda x, y, a, b, t: x.add_(0.1),
    "mul_ of the vector": lambda x, y, a, b, t: t.mul_(1.5),
    "mul_ of a factor": lambda x, y, a, b, t: a.mul_(0.5),
    "copy_": lambda x, y, a, b, t: x.copy_(y.t().clone()),
    "row of a view": lambda x, y, a, b, t: x.t()[1:3].mul_(0.5),
    "out=": lambda x, y, a, b, t: torch.tanh(y, out=x),
    "relu by position": lambda x, y, a, b, t: F.relu(x, True),
    "dropout by position": lambda x, y, a, b, t: F.dropout(x, 0.5, True, True),
    "dropout of nothing": lambda x, y, a, b, t: F.dropout(x, 0.5, False).add_(0.1),
    "foreach": lambda x, y, a, b, t: torch._foreach_add_([t, x], 0.1),
    "product added": lambda x, y, a, b, t: x.add_(y @ a @ b),
}

_INDEX = st.integers(0, 50)
_STEP = st.tuples(st.sampled_from([*MAKES, *MAKES, *WRITES]), _INDEX, _INDEX)
PROGRAMS = st.lists(_STEP, min_size=3, max_size=10)
LAYOUTS = st.tuples(*[st.sampled_from(["plain", "turned", "strided"])] * 3)


def program(steps: list[tuple[str, int, int]]) -> Callable[..., Any]:
    """The function that runs some steps."""

    def fn(x: Any, y: Any, z: Any, a: Any, b: Any, t: Any) -> Any:
        pool = [x, y, z]
        for name, i, j in steps:
            args = (pool[i % len(pool)], pool[j % len(pool)], a, b, t)
            if name in MAKES:
                pool.append(MAKES[name](*args))
            else:
                WRITES[name](*args)
        return tuple(pool[3:])

    return fn


def inputs(layouts: tuple[str, ...]) -> list[Tensor]:
    """Three square tensors, two factors and a vector."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / N**0.5

    squares = []
    for layout in layouts:
        whole = make(N, 2 * N)
        squares.append(whole[:, ::2] if layout == "strided" else whole[:, :N].clone())
        if layout == "turned":
            squares[-1] = squares[-1].t()
    return [*squares, make(N, RANK), make(RANK, N), make(N)]


def memories(results: tuple[Tensor, ...]) -> list[int]:
    """For each result the first that it shares memory with."""
    storages = [result.untyped_storage().data_ptr() for result in results]
    return [storages.index(storage) for storage in storages]


@pytest.mark.parametrize("level", ["symbolic_trace", "make_fx"])
@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(steps=PROGRAMS, layouts=LAYOUTS)
def test_random_programs(
    level: str, steps: list[tuple[str, int, int]], layouts: tuple[str, ...]
) -> None:
    check(level, steps, layouts)


def check(level: str, steps: list[tuple[str, int, int]], layouts: tuple[str, ...]) -> None:
    """Compare a program with what it is rewritten to."""
    fn, example = program(steps), inputs(layouts)
    if not any(name in MAKES for name, _, _ in steps):
        return
    gm = fx.symbolic_trace(fn) if level == "symbolic_trace" else make_fx(fn)(*inputs(layouts))
    new = runlora_fx.rewrite(gm, example, strict=True)
    outcomes = []
    for run in (new, gm):
        arguments = inputs(layouts)
        torch.manual_seed(0)
        outcomes.append((run(*arguments), arguments))
    (found, ours), (expected, theirs) = outcomes
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, theirs)
    before = memories(expected)
    assert all(before[i] == before[j] for i, j in enumerate(memories(found)))
