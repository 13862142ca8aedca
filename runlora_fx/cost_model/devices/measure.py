"""Measurement: the time of single operations on a device, also in the middle of a compilation.

Example: ``matmul_seconds(GemmShape(1, 256, 768, 768), torch.float32, device)`` multiplies random
matrices until the time is known, and answers ``2.1e-3``.

Invariant: data is real and random, and the device has done its work before the clock is read. The
fake tensors of a trace around it do not reach it. The user's random state, autocast and gradient
mode stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from timeit import default_timer

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from runlora_fx._torch_compat import outside_all_modes
from runlora_fx.cost_model.devices.fit import FREE
from runlora_fx.cost_model.devices.registry import entry_of
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
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def random_tensor(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normally distributed numbers; the user's random state is not touched."""
    generator = entry_of(device).generator(device)
    if generator is None:  # drawn on the host, and copied
        host = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=host).to(device, dtype)
    generator.manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def seconds(run: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    """The time of a call [s]: the least of some medians, since disturbances only add.

    Args:
        run: What to call.
        device: Where it computes; the clock is read when the device has done its work.
        repeats: How many medians are taken.

    Raises:
        RuntimeError: What the call raises, such as that memory does not suffice.
    """

    def clock() -> float:
        synchronise(device)
        return default_timer()

    synchronise = entry_of(device).synchronise
    run()
    threads = torch.get_num_threads()
    timer = Timer("run()", globals={"run": run}, timer=clock, num_threads=threads)
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
    return seconds(lambda: torch.matmul(left, right, out=out), device)


def add_seconds(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> float:
    """The time of an elementwise sum of two matrices [s]."""
    a, b = (random_tensor(rows, cols, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return seconds(lambda: torch.add(a, b, out=out), device)


def pointwise_seconds(count: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """What a special function and a random number take, beyond the bytes that they move [s].

    They are compiled by Inductor, as those of a compiled model are.

    Args:
        count: Elements to compute.
        dtype: Of the elements.
        device: Where they are computed.

    Returns:
        The time of one element, by the name of the cost term; positive, also where noise hides it.

    Raises:
        Exception: If Inductor cannot compile, such as where there is no compiler.
    """
    x = random_tensor(count, dtype=dtype, device=device)

    def took(run: Callable[[Tensor], Tensor]) -> float:
        compiled = torch.compile(run, dynamic=False)
        return seconds(lambda: compiled(x), device)

    plain = took(lambda x: x + 1)
    times = {"special": took(torch.exp), "random": took(lambda x: x + torch.rand_like(x))}
    return {name: max((time - plain) / count, FREE) for name, time in times.items()}


def _operand(
    b: int, rows: int, cols: int, turned: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if turned:
        return random_tensor(b, cols, rows, dtype=dtype, device=device).mT
    return random_tensor(b, rows, cols, dtype=dtype, device=device)
