"""Peak memory: the most that a call holds at once, beyond what was held before it.

    peak_bytes(step, torch.device("cuda"))  ->  1288490188, by ``max_memory_allocated``
    peak_bytes(step, torch.device("cpu"))   ->  94371840, by the allocator's trace

Bytes that autograd keeps are a part of it. The rest are temporaries, gradients and results.

Invariant: every allocation of torch's allocator for the device counts, also those of compiled code.
What other libraries take for themselves, such as a workspace of oneDNN, does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_source(device: torch.device) -> str:
    """How the peak of a device is found, as tables call it."""
    return "the allocator's trace" if device.type == "cpu" else "max_memory_allocated"


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call holds at once, beyond what was held before it [B].

    Args:
        run: What to call; it runs once. Compile it before, because compiling takes memory too.
        device: Whose memory is looked at.

    Raises:
        Exception: What the call raises.
    """
    if device.type == "cpu":
        return _traced(run)
    memory = torch.get_device_module(device)
    memory.synchronize(device)
    memory.reset_peak_memory_stats(device)
    before = memory.memory_allocated(device)
    run()
    memory.synchronize(device)
    return int(memory.max_memory_allocated(device)) - int(before)


def _traced(run: Callable[[], object]) -> int:
    """The highest sum of what the CPU's allocator gave out and took back, in order [B]."""
    profiled = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _without_stderr():
        profiled.start()
    try:
        run()
    finally:
        with _without_stderr():
            profiled.stop()
    held = peak = 0
    results: Any = profiled.profiler
    events = (e for e in results.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what the profiler's library writes to the error stream when it starts and stops."""
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
