"""Measurement: the time of single operations on a device, taken wherever it is asked for.

Also inside a compilation, where fake tensors, Dynamo's modes and the user's settings are in force:
data is real and random, and the user's random numbers, autocast and gradient mode stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from runlora_fx._torch_compat import outside_all_modes
from runlora_fx.cost_model.ops import GemmShape

#: The shortest time that one measurement adds up [s], and how often it is repeated.
_MIN_RUN_S = 2e-3
_REPEATS = 2


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """A context in which operators run eagerly on real tensors, whatever is being traced around."""
    with ExitStack() as stack:
        stack.enter_context(outside_all_modes())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def random_tensor(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normally distributed numbers; the user's random state is not touched."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def seconds(run: Callable[[], object], repeats: int = _REPEATS) -> float:
    """The time of a call [s]: the least of some medians, since disturbances only add.

    Raises:
        RuntimeError: What the call raises, such as that memory does not suffice.
    """
    run()
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    times = [timer.blocked_autorange(min_run_time=_MIN_RUN_S).median for _ in range(repeats)]
    return float(min(times))


def matmul_seconds(shape: GemmShape, dtype: torch.dtype, device: torch.device) -> float:
    """The time of a product [s].

    Raises:
        RuntimeError: If the device has not the memory for it.
    """
    b, m, k, n, left_turned, right_turned = shape
    left = _operand(b, m, k, left_turned, dtype, device)
    right = _operand(b, k, n, right_turned, dtype, device)
    out = torch.empty((b, m, n), dtype=dtype, device=device)
    if b == 1:
        left, right, out = left[0], right[0], out[0]
    return seconds(lambda: torch.matmul(left, right, out=out))


def add_seconds(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> float:
    """The time of an elementwise sum of two matrices [s]."""
    a, b = (random_tensor(rows, cols, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return seconds(lambda: torch.add(a, b, out=out))


def _operand(
    b: int, rows: int, cols: int, turned: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if turned:
        return random_tensor(b, cols, rows, dtype=dtype, device=device).mT
    return random_tensor(b, rows, cols, dtype=dtype, device=device)
