"""What the kernels take of a GPU's processor: registers, shared memory, spills. No GPU is needed.

    python -m benchmarks.kernel_resources [--capabilities 80 90 100]

Every kernel is compiled for compute capabilities of NVIDIA's GPUs, with the blocks that it would be
launched with, by the compiler and the assembler that Triton's wheel ships. Registers and spills are
what the assembler says, shared memory is what Triton says. Nothing runs, and no time is measured.

Invariant: equal versions of Triton and this package give equal numbers on every machine.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from runlora_fx.kernels import blocks, programs
from runlora_fx.kernels.blocks import Blocks

CAPABILITIES = (80, 90, 100)
RANKS = (16, 32, 64, 128)

#: Triton's names of dtypes.
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

_THREADS_OF_WARP = 32
_SIZE = "i32"


@dataclass(frozen=True)
class Compiled:
    """A kernel as it is compiled.

    Attributes:
        kernel: The operator.
        variant: Of its operands.
        dtype: That it multiplies in.
        rank: Of the adapters.
        program: The Triton program.
        types: Of its arguments that are not known when it is compiled.
        known: Its other arguments but for the blocks: switches, and the strides that are 1.
        division: Its blocks.
    """

    kernel: str
    variant: str
    dtype: str
    rank: int
    program: Any
    types: Mapping[str, str]
    known: Mapping[str, Any]
    division: Blocks

    def source(self) -> ASTSource:
        """What Triton compiles: pointers and sizes are multiples of 16, as in real models."""
        names = list(self.program.arg_names)
        known = {**self.known, **self.division.sizes}
        signature = {name: self.types.get(name, "constexpr") for name in names}
        aligned = [n for n, t in self.types.items() if t.startswith("*") or t == _SIZE]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        return ASTSource(self.program, signature, known, attributes)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        registers: Of a thread.
        shared_B: Shared memory of a block [B].
        spilled_B: What a thread stores for want of registers, and loads again [B].
    """

    registers: int
    shared_B: int
    spilled_B: int


def variants(dtype: str, rank: int) -> Iterator[Compiled]:
    """Every kernel in a dtype and a rank, for operands that lie as they do in a linear layer."""
    pointer = f"*{DTYPES[dtype]}"
    precision = {"PRECISION": "ieee" if dtype == "float32" else "tf32"}
    sizes = dict.fromkeys(("height", "width", "rank", "w_row", "b_row", "a_row"), _SIZE)
    for weight in ("float32", "bfloat16") if dtype == "float32" else (dtype,):
        stored = f"*{DTYPES[weight]}"
        types = {"w": stored, "b": pointer, "a": pointer, "out": stored, **sizes, "scale": "fp32"}
        yield Compiled(
            *("merge", "" if weight == dtype else f"{weight} weight", dtype, rank),
            programs.merge_program,
            types,
            {"w_col": 1, "b_col": 1, "a_col": 1, **precision},
            blocks.merge_blocks(rank, dtype),
        )
    sizes = dict.fromkeys(("tokens", "outputs", "rank", "span", "dy_row", "b_row", "s_row"), _SIZE)
    types = {"dy": pointer, "b": pointer, "s": pointer, "z": "*fp32", "g": "*fp32", **sizes}
    for is_atomic in (False, True):
        yield Compiled(
            *("gradient_products", "atomic" if is_atomic else "deterministic", dtype, rank),
            programs.one_pass_program,
            types,
            {"dy_col": 1, "b_col": 1, "s_col": 1, "ATOMIC": is_atomic, **precision},
            blocks.one_pass_blocks(rank, dtype),
        )
    operands = dict.fromkeys(("x", "w", "s", "b", "bias", "out"), pointer)
    sizes = dict.fromkeys(("tokens", "outputs", "inputs", "rank", "x_row", "s_row"), _SIZE)
    for variant, is_turned, has_bias in (
        ("X W' + S B'", False, False),
        ("X W' + S B' + bias", False, True),
        ("dY W + Z A", True, False),
    ):
        ones = ("w_row", "b_row") if is_turned else ("w_col", "b_col")
        strides = ("w_col", "b_col") if is_turned else ("w_row", "b_row")
        yield Compiled(
            *("two_products", variant, dtype, rank),
            programs.two_products_program,
            {**operands, **sizes, **dict.fromkeys(strides, _SIZE)},
            {
                **dict.fromkeys((*ones, "x_col", "s_col", "bias_at"), 1),
                "HAS_BIAS": has_bias,
                **precision,
            },
            blocks.two_products_blocks(rank, dtype),
        )


def resources(compiled: Compiled, capability: int) -> Resources:
    """Compile and assemble a kernel for a compute capability, such as 90 for 9.0."""
    division = compiled.division
    kernel = triton.compile(
        compiled.source(),
        target=GPUTarget("cuda", capability, _THREADS_OF_WARP),
        options={"num_warps": division.warps, "num_stages": division.stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"], encoding="utf-8")
        command = [get_ptxas(capability).path, "-v", "--regAllocOptLevel=2", str(source)]
        architecture = sm_arch_from_capability(capability)
        command += [f"--gpu-name={architecture}", "-o", str(source.with_suffix(".cubin"))]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    if registers is None or not spills:
        raise RuntimeError(f"the assembler said nothing of registers and spills: {said}")
    return Resources(int(registers[1]), kernel.metadata.shared, sum(map(int, spills)))


def rows(capabilities: Sequence[int]) -> list[dict[str, Any]]:
    """A mapping for each kernel, dtype, rank and compute capability."""
    wanted = [kernel for dtype, rank in product(DTYPES, RANKS) for kernel in variants(dtype, rank)]
    return [
        {
            **{n: getattr(kernel, n) for n in ("kernel", "variant", "dtype", "rank")},
            "blocks": dict(kernel.division.sizes),
            "warps": kernel.division.warps,
            "stages": kernel.division.stages,
            "capability": capability,
            **asdict(resources(kernel, capability)),
        }
        for kernel, capability in track([*product(wanted, capabilities)], description="compiling")
    ]


def table(found: Sequence[Mapping[str, Any]], capabilities: Sequence[int]) -> str:
    """The resources as Markdown: a line for each kernel, dtype and rank."""
    shown = " | ".join(f"{c / 10:.1f}" for c in capabilities)
    lines = [
        f"| kernel | variant | dtype | rank | blocks | warps | {shown} |",
        f"|---|---|---|---|---|---|{'---|' * len(capabilities)}",
    ]
    for start in range(0, len(found), len(capabilities)):
        row, cells = found[start], found[start : start + len(capabilities)]
        sizes = " x ".join(str(size) for name, size in row["blocks"].items() if name != "GROUP")
        taken = " | ".join(
            f"{c['registers']} / {c['shared_B'] / 1024:.0f} / {c['spilled_B']}" for c in cells
        )
        lines.append(
            f"| {row['kernel']} | {row['variant']} | {row['dtype']} | {row['rank']} | {sizes} "
            f"| {row['warps']} | {taken} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compile all kernels, and write table and data."""
    parser = argparse.ArgumentParser(description="Registers, shared memory and spills.")
    parser.add_argument("--capabilities", type=int, nargs="+", default=list(CAPABILITIES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    found = rows(given.capabilities)
    spilling = sum(row["spilled_B"] > 0 for row in found)
    text = "\n\n".join(
        [
            f"Compiled without a GPU by Triton {triton.__version__}. For each compute capability: "
            "registers of a thread / shared memory of a block [KiB] / spilled bytes of a thread. "
            f"{spilling} of {len(found)} kernels spill. Nothing was run.",
            table(found, given.capabilities),
        ]
    )
    print(text)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "kernels.md").write_text(text + "\n", encoding="utf-8")
    content = {"triton": triton.__version__, "rows": found}
    (given.out / "kernels.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
