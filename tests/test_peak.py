"""Peak memory: what a call holds at once, eager and compiled."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from runlora_fx.cost_model.devices.peak import peak_bytes, peak_source

CPU = torch.device("cpu")
MATRIX = 256 * 256 * 4


def peak(run: Callable[[], object]) -> int:
    return peak_bytes(run, CPU)


def test_it_is_the_most_that_is_held_at_once() -> None:
    def run() -> None:
        first, second = torch.empty(256, 256), torch.empty(256, 256)
        del first, second
        torch.empty(256, 256)

    assert peak(run) == 2 * MATRIX


def test_what_was_held_before_does_not_count() -> None:
    held = [torch.empty(256, 256)]
    assert peak(lambda: torch.empty(128, 256)) == MATRIX // 2
    assert peak(held.clear) == 0


def test_allocations_of_compiled_code_count() -> None:
    """Two products that are read together cannot share memory; the sum is written in place."""

    @torch.compile
    def run(x: Tensor, y: Tensor) -> Tensor:
        return x @ y + y @ x

    x, y = torch.randn(256, 256), torch.randn(256, 256)
    run(x, y)
    assert peak(lambda: run(x, y)) == 2 * MATRIX


def test_a_failure_is_raised_and_the_profiler_is_stopped(capfd: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        peak(run)
    assert peak(lambda: torch.empty(256, 256)) == MATRIX
    assert not capfd.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_says_so_itself() -> None:
    device = torch.device("cuda")
    assert peak_bytes(lambda: torch.empty(256, 256, device=device), device) == MATRIX
    assert peak_source(device) == "max_memory_allocated"


def test_tables_say_how_it_was_found() -> None:
    assert peak_source(CPU) == "the allocator's trace"
