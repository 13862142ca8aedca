"""Operands of the kernels: what they have to be, and where a kernel runs.

    check_matrices(w=w, b=b, a=a)             ->  nothing, or an error that names one of them
    check_sizes("rank", b.shape[1], a=a.shape[0])

Invariant: an error names the argument, what it is, and what it has to be.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from runlora_fx.kernels.programs import merge_program

#: The dtypes that the kernels take.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: True if the environment variable ``TRITON_INTERPRET`` was set when Triton was imported.
_IS_INTERPRETED = not isinstance(merge_program, JITFunction)


def check_matrices(**given: Tensor) -> None:
    """Check that tensors are matrices of floats on one device.

    Raises:
        ValueError: If one is not a matrix, or is on another device than the first.
        TypeError: If one has a dtype that no kernel takes.
    """
    first, *_ = given
    for name, tensor in given.items():
        if tensor.dim() != 2:
            raise ValueError(f"{name} must be a matrix, not of {tensor.dim()} dimensions")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be in {_listed(DTYPES)}, not {tensor.dtype}")
        if tensor.device != given[first].device:
            where = given[first].device
            raise ValueError(f"{name} must be on {where}, as {first} is, not {tensor.device}")


def check_dtypes(**given: Tensor) -> None:
    """Check that all tensors have the dtype of the first.

    Raises:
        TypeError: If one does not.
    """
    first, *_ = given
    for name, tensor in given.items():
        if tensor.dtype != given[first].dtype:
            wanted = given[first].dtype
            raise TypeError(f"{name} must be in {wanted}, as {first} is, not {tensor.dtype}")


def check_sizes(meaning: str, wanted: int, **given: int) -> None:
    """Check that sizes are equal to a wanted one.

    Args:
        meaning: What the size is.
        wanted: The size [elements].
        given: Sizes [elements], by the operand that has them.

    Raises:
        ValueError: If one differs.
    """
    for name, size in given.items():
        if size != wanted:
            raise ValueError(f"{name} must have {wanted} {meaning}, not {size}")


def runs_triton(tensor: Tensor) -> bool:
    """True if a kernel is launched for a tensor; else torch's own operators compute the same."""
    if _IS_INTERPRETED:
        return type(tensor) is Tensor and tensor.is_cpu and tensor.numel() > 0
    return tensor.is_cuda and tensor.numel() > 0


def precision_of(dtype: torch.dtype) -> str:
    """How Triton multiplies: float32 in full, unless torch is allowed to use TF32.

    Products of half precision are exact in float32 in either way. Triton's interpreter multiplies
    the bits of bfloat16 as if they were integers, so it is given them in float32.
    """
    if _IS_INTERPRETED and dtype == torch.bfloat16:
        return "widened"
    is_full = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if is_full else "tf32"


def name_of(dtype: torch.dtype) -> str:
    """A dtype as profiles and blocks name it."""
    return str(dtype).removeprefix("torch.")


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(name_of, dtypes))
