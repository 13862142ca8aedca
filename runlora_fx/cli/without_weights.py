"""Models without weights: a context in which modules are made on the meta device.

    with on_meta(torch.bfloat16):
        model = LlamaForCausalLM(config)          no memory, whatever its size

Invariant: the default dtype and device are those of before when the context ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

META = torch.device("meta")


@contextmanager
def on_meta(dtype: torch.dtype, device: torch.device = META) -> Iterator[None]:
    """A context with another default dtype, on the meta device or on a given one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
