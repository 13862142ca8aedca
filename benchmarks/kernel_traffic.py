"""What a layer would move with the fused kernels: predicted from counts, nothing is run.

    python benchmarks/kernel_traffic.py [--scale 4]

The frozen layer, PEFT + Inductor and runlora are counted by Inductor's scheduler, as in
``benchmarks/traffic.py``. The planner cannot make the plan with the kernels yet. So it is written
down here, and its bytes are counted by :mod:`runlora_fx.kernels.counts`. Per group of projections
that share their input X, and per projection of the group ::

    S = X A'  (A stacked for the group)     X read once
    Y = X W' + S B'                         the base product, and S and B
    Z = dY B,  dB = dY' S                   dY read once
    dX = dY W + Z A                         the base product, and Z and A
    dA = Z' X  (Z stacked for the group)    X read once

With dropout every projection has a mask of its own, and the kernels draw none. Inductor draws the
masks and writes D(X), once for S and once for dA. ``Z A`` is written, and read where it is masked.

Invariant: the base products and everything around the projections cost what they cost in the
frozen layer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from traffic import CASES, GB, counted

from runlora_fx.cli.layers import SHAPES, Recipe, Shape
from runlora_fx.kernels.counts import (
    gradient_products_bytes,
    product_bytes,
    two_products_bytes,
)

_DTYPE, _ITEMSIZE = "bfloat16", 2


class Group(NamedTuple):
    """Projections that share their input.

    Attributes:
        inputs: Width of the input.
        outputs: Widths of the results.
        made_from: Tensors of the input's size that a pointwise kernel makes the input from; 0 if
            the frozen layer keeps it.
    """

    inputs: int
    outputs: tuple[int, ...]
    made_from: int


def groups_of(shape: Shape) -> tuple[Group, ...]:
    """The seven projections of a Llama layer."""
    kv = shape.width * shape.groups // shape.heads
    return (
        Group(shape.width, (shape.width, kv, kv), 1),  # the norm of the residual stream
        Group(shape.width, (shape.width,), 0),  # attention's result, which its backward needs
        Group(shape.width, (shape.inner, shape.inner), 1),
        Group(shape.inner, (shape.width,), 2),  # silu(gate) * up
    )


def added_bytes(group: Group, tokens: int, rank: int, *, deterministic: bool) -> int:
    """What adapters without dropout add to the bytes of the frozen projections [B]."""
    stacked = rank * len(group.outputs)
    total = product_bytes(tokens, group.inputs, stacked, _ITEMSIZE)
    total += product_bytes(stacked, tokens, group.inputs, _ITEMSIZE)
    for outputs in group.outputs:
        sizes = ((outputs, group.inputs), (group.inputs, outputs))
        for out, inner in sizes:
            fused = two_products_bytes(tokens, out, inner, rank, _ITEMSIZE)
            total += fused - product_bytes(tokens, inner, out, _ITEMSIZE)
        total += gradient_products_bytes(
            tokens, outputs, rank, _DTYPE, _ITEMSIZE, deterministic=deterministic
        )
    return total


def made_again_bytes(group: Group, tokens: int) -> int:
    """The input written once more; it is made where the backward reads what it is made from [B]."""
    return tokens * group.inputs * _ITEMSIZE if group.made_from else 0


def dropout_bytes(group: Group, tokens: int, rank: int, *, is_made_again: bool) -> int:
    """What adapters with dropout add, with masks that Inductor draws [B]."""
    activation = tokens * group.inputs * _ITEMSIZE
    total = 2 * activation  # X read to be masked, forward and backward
    if is_made_again and group.made_from:
        total += (group.made_from - 1) * activation  # or else what it is made from
    for outputs in group.outputs:
        # D(X) written, and read by the product: forward and backward. Z A written and read.
        total += 2 * activation
        total += product_bytes(tokens, group.inputs, rank, _ITEMSIZE)
        total += product_bytes(rank, tokens, group.inputs, _ITEMSIZE)
        total += product_bytes(tokens, rank, group.inputs, _ITEMSIZE) + activation
        fused = two_products_bytes(tokens, outputs, group.inputs, rank, _ITEMSIZE)
        total += fused - product_bytes(tokens, group.inputs, outputs, _ITEMSIZE)
        total += gradient_products_bytes(
            tokens, outputs, rank, _DTYPE, _ITEMSIZE, deterministic=True
        )
    return total


def rows(recipe: Recipe, scale: int, device: str) -> dict[str, int]:
    """What each variant adds to the bytes of the frozen layer [B]."""
    shape, length = SHAPES[recipe.shape].scaled(scale), recipe.length // scale
    tokens, rank, groups = recipe.rows * length, recipe.rank, groups_of(shape)
    frozen = counted(recipe, scale, None, is_adapted=False).moved
    options = {"strict": True, "device": device}
    found = {
        "PEFT + Inductor": counted(recipe, scale, None, is_adapted=True).moved - frozen,
        "runlora": counted(recipe, scale, options, is_adapted=True).moved - frozen,
    }
    if recipe.dropout:
        for is_made_again in (False, True):
            name = f"kernels, inputs {'made again' if is_made_again else 'kept'}"
            found[name] = sum(
                dropout_bytes(g, tokens, rank, is_made_again=is_made_again) for g in groups
            )
        return found
    for deterministic in (True, False):
        variant = "deterministic" if deterministic else "atomic"
        kept = sum(added_bytes(g, tokens, rank, deterministic=deterministic) for g in groups)
        found[f"kernels, {variant}, inputs kept"] = kept
        again = sum(made_again_bytes(g, tokens) for g in groups)
        found[f"kernels, {variant}, inputs made again"] = kept + again
    return found


def table(found: dict[str, dict[str, int]]) -> str:
    """Bytes as Markdown."""
    lines = ["| case | variant | from | moved beyond frozen, GB | tax |", "|---|---|---|---|---|"]
    for case, variants in found.items():
        base = variants["PEFT + Inductor"]
        for name, moved in variants.items():
            source = "predicted from counts" if name.startswith("kernels") else "counted"
            lines.append(f"| {case} | {name} | {source} | {moved / GB:.3f} | {moved / base:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Count the cases that the plan covers, and write table and data."""
    parser = argparse.ArgumentParser(description="Bytes moved with the fused kernels.")
    parser.add_argument("--scale", type=int, default=1, help="divide widths and tokens by this")
    parser.add_argument("--device", default="h100", help="the device to plan for")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    wanted = ("no dropout", "dropout 0.05", "rank 8", "rank 64", "rank 128")
    found = {name: rows(CASES[name], given.scale, given.device) for name in wanted}
    text = "\n\n".join(
        [
            f"A Llama-3-8B layer, widths and tokens / {given.scale}, planned for {given.device}; "
            f"counted by Inductor's scheduler, torch {torch.__version__}. Rows of kernels are "
            "predicted from counts: no plan has them yet, and nothing was run or timed.",
            table(found),
        ]
    )
    print(text)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "kernel_traffic.md").write_text(text + "\n", encoding="utf-8")
    content = {"torch": torch.__version__, "scale": given.scale, "device": given.device}
    (given.out / "kernel_traffic.json").write_text(
        json.dumps({**content, "added_B": found}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
