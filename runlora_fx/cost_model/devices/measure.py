"""Measurement: time single operations on a device, even while a graph is being traced.

Example: ``matmul_seconds(GemmShape(1, 256, 768, 768), torch.float32, device)`` multiplies random
matrices several times and returns ``2.1e-3``.

Invariant: operations run on real random data, and the clock is read after the device has finished.
The tracing modes around the call are off. The user's random state, autocast and gradient mode do
not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from timeit import default_timer

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from runlora_fx._torch_compat import outside_all_modes
from runlora_fx.cost_model.devices.registry import entry_of
from runlora_fx.cost_model.ops import GemmShape, MergeShape
from runlora_fx.cost_model.profile import FREE

#: The least total time of the runs of one measurement [s], and the number of measurements.
_MIN_RUN_S = 2e-3
_REPEATS = 2

#: Matrices that are picked to measure picking, as adapters of rank 16: their number, rows, columns.
_PICKED = (64, 16, 4096)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """A context in which operators run eagerly on real tensors, even inside a trace."""
    with ExitStack() as stack:
        stack.enter_context(outside_all_modes())
        stack.enter_context(torch.no_grad())
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def random_tensor(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normally distributed numbers from a generator of their own."""
    generator = entry_of(device).generator(device)
    if generator is None:  # drawn on the host, and copied
        host = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=host).to(device, dtype)
    generator.manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def seconds(run: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    """The time of a call [s]: the least of some medians, because disturbances only add time.

    Args:
        run: The function to call.
        device: The device that it computes on. The clock is read after the device has finished.
        repeats: The number of medians.

    Raises:
        RuntimeError: If the call raises it, such as for lack of memory.
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
        RuntimeError: If the device lacks the memory.
    """
    left, right = _operands(shape, dtype, device)
    out = torch.empty((*left.shape[:-1], right.shape[-1]), dtype=dtype, device=device)
    return seconds(lambda: torch.matmul(left, right, out=out), device)


def upcast_seconds(shape: GemmShape, dtype: torch.dtype, device: torch.device) -> float:
    """The time of a product that is computed in float32, with the casts before and after [s].

    Raises:
        RuntimeError: If the device lacks the memory.
    """
    left, right = _operands(shape, dtype, device)
    return seconds(lambda: torch.matmul(left.float(), right.float()).to(dtype), device)


def runs_kernels(device: torch.device, dtype: str) -> bool:
    """True if the fused kernels run on a device in a dtype: CUDA's, with Triton, not float64."""
    if device.type != "cuda" or dtype == "float64":
        return False
    from runlora_fx import kernels  # only here: it imports Triton

    return bool(kernels.__all__)


def merge_seconds(shape: MergeShape, dtype: torch.dtype, device: torch.device) -> float:
    """The time of a merge by the fused kernel or by ``addmm`` [s].

    Raises:
        RuntimeError: If the device has not the memory for it, or cannot run the kernel.
    """
    from runlora_fx.kernels.merge import merge

    rows, cols, rank, is_fused = shape
    w, b, a = (
        random_tensor(*size, dtype=dtype, device=device)
        for size in ((rows, cols), (rows, rank), (rank, cols))
    )
    if is_fused:
        return seconds(lambda: merge(w, b, a, 2.0), device)
    return seconds(lambda: torch.addmm(w, b, a, alpha=2.0), device)


def add_seconds(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> float:
    """The time of an elementwise sum of two matrices [s]."""
    a, b = (random_tensor(rows, cols, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return seconds(lambda: torch.add(a, b, out=out), device)


def pointwise_seconds(count: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The times of a special function, a random number and a picked byte [s].

    Those of functions and random numbers are without the bytes that they move. Inductor compiles
    the kernels, as it does for a compiled model.

    Args:
        count: Elements to compute.
        dtype: The dtype of the elements.
        device: The device that computes them.

    Returns:
        By cost term, the time of one unit; positive even if it is hidden by noise.

    Raises:
        Exception: If Inductor cannot compile, for example without a C++ compiler.
    """
    x = random_tensor(count, dtype=dtype, device=device)

    def took(run: Callable[[Tensor], Tensor]) -> float:
        compiled = torch.compile(run, dynamic=False)
        return seconds(lambda: compiled(x), device)

    plain = took(lambda x: x + 1)
    times = {"special": took(torch.exp), "random": took(lambda x: x + torch.rand_like(x))}
    found = {name: max((time - plain) / count, FREE) for name, time in times.items()}
    return {**found, "picked": _picked_seconds(dtype, device)}


def _picked_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The time of a byte that is read or written to pick matrices for a product [s].

    It is what a compiled product with picked matrices takes longer than one with matrices that are
    there; positive even if it is hidden by noise.
    """
    count, rows, cols = _PICKED
    stack = random_tensor(count // 2, rows, cols, dtype=dtype, device=device)
    x = random_tensor(count, 1, cols, dtype=dtype, device=device)
    k = torch.arange(count, device=device) // 2
    matrices = stack[k]
    picks = torch.compile(lambda x, stack, k: torch.bmm(x, stack[k].mT), dynamic=False)
    plain = torch.compile(lambda x, matrices: torch.bmm(x, matrices.mT), dynamic=False)
    took = seconds(lambda: picks(x, stack, k), device)
    longer = took - seconds(lambda: plain(x, matrices), device)
    return max(longer / (2 * matrices.numel() * matrices.itemsize), FREE)


def _operands(shape: GemmShape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    b, m, k, n, left_turned, right_turned = shape
    left = _operand(b, m, k, left_turned, dtype, device)
    right = _operand(b, k, n, right_turned, dtype, device)
    return (left[0], right[0]) if b == 1 else (left, right)


def _operand(
    b: int, rows: int, cols: int, turned: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if turned:
        return random_tensor(b, cols, rows, dtype=dtype, device=device).mT
    return random_tensor(b, rows, cols, dtype=dtype, device=device)
