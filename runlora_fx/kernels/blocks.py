"""The blocks that the kernels work in: sizes, warps and stages, by rank and element width.

    merge_blocks(16, "bfloat16")  ->  Blocks({"ROWS": 128, "COLS": 128, "RANK": 16}, 8 warps, ...)

They are fixed and not autotuned, so that a kernel computes the same on every call. They are chosen
such that no kernel spills registers for compute capability 80, 90 and 100, and none takes more than
:data:`SHARED_LIMIT` of shared memory (``python -m benchmarks.kernel_resources`` shows both). No
device has timed them.

Invariant: the sizes are powers of two, and at least 16, as tensor cores want them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: The shared memory that a block may take [B]: what compute capability 86 and 89 offer.
SHARED_LIMIT = 99 << 10

#: The highest rank that the kernel of one pass over dY holds in registers.
MAX_ONE_PASS_RANK = 128

#: About so many blocks does a launch have, where its sizes allow: GPUs have up to 148 processors.
_BLOCKS_OF_A_LAUNCH = 128

_SMALLEST = 16
_WIDE = "float32"

#: Rows and columns of dY in a block, by the padded rank: in half precision, and in float32. Both
#: accumulators stay in registers. More rows make fewer parts of dY' S to add up.
_HALF_PASS = {16: (512, 32), 32: (256, 64), 64: (128, 32), 128: (128, 32)}
_WIDE_PASS = {16: (64, 32), 32: (64, 32), 64: (32, 32), 128: (16, 32)}


@dataclass(frozen=True)
class Blocks:
    """How a kernel divides its work.

    Attributes:
        sizes: Edges of blocks [elements], by the names of the program's parameters.
        warps: Of a block.
        stages: Loads that are under way at a time.
    """

    sizes: Mapping[str, int]
    warps: int
    stages: int

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    @property
    def launch(self) -> dict[str, int]:
        """What a launch is given beyond the operands."""
        return {**self.sizes, "num_warps": self.warps, "num_stages": self.stages}


def covering(size: int, largest: int) -> int:
    """The least power of two from 16 on that covers a size, or the largest one allowed."""
    found = _SMALLEST
    while found < min(size, largest):
        found *= 2
    return found


def merge_blocks(rank: int, dtype: str) -> Blocks:
    """The blocks of the merge.

    Args:
        rank: Of the adapters.
        dtype: Of the adapters, as torch names it.
    """
    if dtype == _WIDE:
        return Blocks({"ROWS": 64, "COLS": 64, "RANK": covering(rank, 32)}, 8, 1)
    return Blocks({"ROWS": 128, "COLS": 128, "RANK": covering(rank, 64)}, 8, 1)


def one_pass_blocks(rank: int, dtype: str) -> Blocks:
    """The blocks of the pass over dY, for ranks up to :data:`MAX_ONE_PASS_RANK`."""
    padded = covering(rank, MAX_ONE_PASS_RANK)
    tokens, outputs = (_WIDE_PASS if dtype == _WIDE else _HALF_PASS)[padded]
    sizes = {"TOKENS": tokens, "OUTPUTS": outputs, "RANK": padded}
    return Blocks(sizes, 8, 1 if dtype == _WIDE else 2)


def two_products_blocks(rank: int, dtype: str) -> Blocks:
    """The blocks of two products with one accumulator."""
    if dtype == _WIDE:
        sizes = {"TOKENS": 64, "OUTPUTS": 32, "INPUTS": 32, "RANK": covering(rank, 32)}
        return Blocks({**sizes, "GROUP": 8}, 8, 2)
    sizes = {"TOKENS": 128, "OUTPUTS": 128, "INPUTS": 64, "RANK": covering(rank, 64)}
    return Blocks({**sizes, "GROUP": 8}, 8, 3)


def span_of(tokens: int, outputs: int, blocks: Blocks) -> int:
    """The columns of dY that one block passes over [elements]: a multiple of its OUTPUTS.

    Args:
        tokens: Rows of dY.
        outputs: Columns of dY.
        blocks: The blocks of the pass.
    """
    tall = -(-tokens // blocks["TOKENS"])
    parts = max(1, _BLOCKS_OF_A_LAUNCH // tall)
    steps = -(-outputs // blocks["OUTPUTS"])
    return -(-steps // parts) * blocks["OUTPUTS"]
