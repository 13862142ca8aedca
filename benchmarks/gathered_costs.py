"""What adapters of convolutions and embeddings cost, as they come and in the cheapest order: FLOPs.

    python benchmarks/gathered_costs.py

The first table has layers of image models, as PEFT adapts them. Each is traced without data, alone,
with an input that needs a gradient unless it is the first one. Its report has the FLOPs of all
products, and the bytes that the layer saves for the backward besides its input.

The second table has embeddings. There are two orders: gather rows of A and multiply them by B, or
merge ``M = W + s A B`` and gather rows of M. Both are counted by the cost model's formulas.

Invariant: equal versions of torch, PEFT and this package give equal numbers on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import runlora_fx
from runlora_fx.cost_model.cost import Cost
from runlora_fx.cost_model.ops import Elementwise, MatMul

RANK = 16

#: Bytes of an element of a 16-bit model.
ITEMSIZE = 2


@dataclass(frozen=True)
class Images:
    """A convolution and its images.

    Attributes:
        name: Where such a layer is found.
        layer: Inputs, outputs, kernel, stride and padding.
        images: How many, of how many rows and columns.
    """

    name: str
    layer: tuple[int, int, int, int, int]
    images: tuple[int, int, int]


#: Layers of the U-Net of Stable Diffusion 1.5 for images of 512 x 512, and the first one of ViT-B.
LAYERS = (
    Images("U-Net, 3 x 3", (320, 320, 3, 1, 1), (4, 64, 64)),
    Images("U-Net, 3 x 3", (640, 640, 3, 1, 1), (4, 32, 32)),
    Images("U-Net, 3 x 3", (1280, 1280, 3, 1, 1), (4, 16, 16)),
    Images("U-Net, 3 x 3", (1280, 1280, 3, 1, 1), (4, 8, 8)),
    Images("U-Net, stride 2", (320, 320, 3, 2, 1), (4, 64, 64)),
    Images("U-Net, 1 x 1", (320, 320, 1, 1, 0), (4, 64, 64)),
    Images("ViT, patches of 16 x 16", (3, 768, 16, 16, 0), (32, 224, 224)),
)

#: Rows of the table, width, and tokens of a call.
EMBEDDINGS = (
    ("Llama-3-8B", 128256, 4096, 8192),
    ("BERT-base, words", 30522, 768, 16384),
    ("ByT5-small, bytes", 384, 1472, 8192),
    ("BERT-base, token types", 2, 768, 16384),
)

HEADS = {
    "convolutions": (
        *("layer", "inputs, outputs", "positions", "kernel", "forward, GFLOP"),
        *("training step, GFLOP", "saved for the backward, MB"),
    ),
    "embeddings": (
        *("table", "rows", "tokens", "gather A, MFLOP", "merge, MFLOP"),
        *("gather A, moved, MB", "merge, moved, MB"),
    ),
}


def _of(numbers: tuple[float, float], digits: str) -> str:
    return " -> ".join(format(number, digits) for number in numbers)


def convolution(case: Images) -> tuple[str, ...]:
    """The row of a convolution."""
    inputs, outputs, kernel, stride, padding = case.layer
    count, *sides = case.images
    with torch.device("meta"):
        layer = nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding))
        model = get_peft_model(layer, LoraConfig(r=RANK, target_modules=["0"])).to(torch.bfloat16)
    x = torch.empty(count, inputs, *sides, dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        forward = runlora_fx.explain(model, x, objective="flops", strict=True)
    x.requires_grad_(inputs > 3)
    step = runlora_fx.explain(model, x, objective="flops", strict=True)
    (site,) = step.sites
    positions = count * (sides[0] // stride) * (sides[1] // stride)
    return (
        case.name,
        f"{inputs}, {outputs}",
        f"{positions:,}",
        f"{kernel} x {kernel}",
        _of((forward.flops_before / 1e9, forward.flops_after / 1e9), ".2f"),
        _of((step.flops_before / 1e9, step.flops_after / 1e9), ".2f"),
        _of((site.saved[0] / 1e6, site.saved[1] / 1e6), ".2f"),
    )


def embedding(name: str, rows: int, width: int, tokens: int) -> tuple[str, ...]:
    """The row of an embedding, forward and backward, without the base layer's own gather."""
    gathered, merged = _orders(rows, width, tokens, RANK)
    return (
        name,
        f"{rows:,} x {width:,}",
        f"{tokens:,}",
        *(f"{float(cost.flops) / 1e6:,.0f}" for cost in (gathered, merged)),
        *(f"{float(cost.bytes) / 1e6:,.1f}" for cost in (gathered, merged)),
    )


def _orders(rows: int, width: int, tokens: int, rank: int) -> tuple[Cost, Cost]:
    """The cost of an adapter, with rows of A gathered, and with the merged table."""

    def product(m: int, k: int, n: int) -> Cost:
        return MatMul(1, m, k, n, ITEMSIZE).cost

    def moved(elements: int) -> Cost:
        return Elementwise(elements * ITEMSIZE).cost

    # Rows of A are gathered, multiplied and added; the backward has two products and a scatter.
    gathered = product(tokens, rank, width) + moved(2 * tokens * rank) + moved(2 * tokens * width)
    gathered += product(rank, tokens, width) + product(tokens, width, rank)
    gathered += moved((2 * tokens + rows) * rank)
    # The table is merged; the backward scatters dY to the table's size, and multiplies twice.
    merged = product(rows, rank, width) + moved(2 * rows * width)
    merged += moved((2 * tokens + rows) * width)
    merged += product(rank, rows, width) + product(rows, width, rank)
    return gathered, merged


def table(name: str) -> str:
    """A table as Markdown."""
    heads = HEADS[name]
    if name == "convolutions":
        rows = [convolution(case) for case in LAYERS]
    else:
        rows = [embedding(*sizes) for sizes in EMBEDDINGS]
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    for name in HEADS:
        print(table(name), end="\n\n")
