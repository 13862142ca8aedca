"""What adapters for each sample cost in inference: bytes moved, FLOPs, and the predicted time.

    python benchmarks/per_sample_costs.py [--tokens 2] [--rank 16] [--width 4096] [--device h100]

A batch of samples runs through one linear layer in bf16. Each sample picks one adapter of a table
by an index, and two batched products multiply by what was picked. The layer is compiled as far as
Inductor's scheduler, which says what each kernel reads and writes: the base layer alone, the layer
under Inductor, and the layer under runlora, planned for a device. Nothing is run.

*Moved* is the sum over the kernels of what they read and write. *Time* is predicted: the seconds
that the device's profile gives for the products and picks of the adapters, without the base layer.

Inductor's kernels for a CPU multiply single rows by picked matrices in place, and those for a GPU
do not. So a layer is counted here for two tokens of each sample or more.

Invariant: equal versions of torch and this package give equal numbers on every machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measuring.counts import Count, counting
from rich.progress import track
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx

import runlora_fx
from runlora_fx.backend import runlora
from runlora_fx.without_data import without_data

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "flavours"))
from per_sample import PerSampleLora

MB = 1e6

SAMPLES, ADAPTERS = (8, 64), (2, 8, 32, 128)


@dataclass(frozen=True)
class Row:
    """One size of the batch and of the table of adapters.

    Attributes:
        samples: In the batch.
        adapters: In the table.
        base: The base layer alone, under Inductor.
        came: The layer under Inductor.
        planned: The layer under runlora.
        seconds: The predicted time of the adapters, before and after [s].
        formula: How the plan computes them.
    """

    samples: int
    adapters: int
    base: Count
    came: Count
    planned: Count
    seconds: tuple[float, float]
    formula: str

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        before, after = self.seconds
        return (
            str(self.samples),
            str(self.adapters),
            *(f"{count.moved / MB:.1f}" for count in (self.base, self.came, self.planned)),
            *(f"{count.flops / 1e9:.2f}" for count in (self.came, self.planned)),
            f"{1e6 * before:.1f}",
            f"{1e6 * after:.1f}",
            f"`{self.formula}`",
        )


HEAD = (
    *("samples", "adapters", "base layer: moved, MB", "Inductor: moved, MB"),
    *("runlora: moved, MB", "Inductor: GFLOP", "runlora: GFLOP"),
    *("adapters, predicted, us", "planned, us", "plan"),
)


def counted(model: nn.Module, inputs: Sequence[Tensor], device: str) -> Count:
    """Compile a model as far as Inductor's scheduler; for no device by Inductor alone."""
    torch._dynamo.reset()
    count = Count()

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if device:
            runlora(gm, inputs, options={"runlora.strict": True, "runlora.device": device})
        else:
            compile_fx(gm, inputs)  # type: ignore[arg-type]
        return gm.forward

    with torch.no_grad(), counting(count), without_data(model, inputs, {}) as (given, _):
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(*given)
    return count


def row(samples: int, adapters: int, tokens: int, width: int, rank: int, device: str) -> Row:
    """Count one size."""
    of = {"dtype": torch.bfloat16, "device": "meta"}
    base = nn.Linear(width, width, bias=False, **of)
    with torch.device("meta"):
        model = PerSampleLora(base, adapters, rank).to(torch.bfloat16).requires_grad_(False)
    x = torch.empty(samples, tokens, width, **of)
    chosen = torch.empty(samples, dtype=torch.int64, device="meta")
    frozen = counted(base, [x], "")
    came = counted(model, [x, chosen], "")
    planned = counted(model, [x, chosen], device)
    report = runlora_fx.last_report()
    assert report is not None
    (site,) = report.sites
    assert site.seconds is not None
    return Row(samples, adapters, frozen, came, planned, site.seconds, _formula(site.after))


def _formula(lines: str) -> str:
    return lines.splitlines()[-1].partition(" = ")[2]


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""

    def lines() -> Iterator[str]:
        yield f"| {' | '.join(HEAD)} |"
        yield "|---" * len(HEAD) + "|"
        for found in rows:
            yield f"| {' | '.join(found.cells)} |"

    return "\n".join(lines())


def main() -> None:
    """Count all sizes, and print the table."""
    parser = argparse.ArgumentParser(description="What adapters for each sample cost.")
    parser.add_argument("--tokens", type=int, default=2, help="of each sample")
    parser.add_argument("--width", type=int, default=4096, help="inputs and outputs of the layer")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--device", default="h100", help="the device to plan for")
    given = parser.parse_args()
    sizes = list(product(SAMPLES, ADAPTERS))
    print(
        f"{given.width} x {given.width}, rank {given.rank}, bf16, {given.tokens} tokens of each "
        f"sample, planned for {given.device}.\n"
    )
    print(
        table(
            [
                row(samples, adapters, given.tokens, given.width, given.rank, given.device)
                for samples, adapters in track(sizes, description="counting")
            ]
        )
    )


if __name__ == "__main__":
    main()
