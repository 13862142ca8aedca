"""Errors of a training step against fp64, for every flavour of LoRA and dtype.

    python -m tests.rounding [--flavour LoRA ...]

One step of each flavour runs in eager mode, under Inductor's graphs and under ours, in fp32, bf16
and fp16, and in fp64 in eager mode from the same rounded weights and inputs. The table has the
norm of the error over the norm of the exact value, over the outputs and over all gradients. It
goes between the markers of docs/numerics.md.

Graphs run operator by operator: kernels add roundings of their own to both backends.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import torch._functorch.config as functorch_config  # noqa: E402
import torch._inductor.config as inductor_config  # noqa: E402
from checks import INDUCTOR, RUNLORA, ours  # noqa: E402
from flavours import FLAVOURS  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from trainings import Batch, Flavour, Products, tensors, without_kernels  # noqa: E402

PAGE = ROOT / "docs" / "numerics.md"
BEGIN, END = "<!-- rounding: begin -->\n", "<!-- rounding: end -->\n"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RUNS = ("eager", INDUCTOR, RUNLORA)

#: Of the outputs, and of all gradients.
Errors = tuple[float, float]


class RefusedError(Exception):
    """Eager mode does not run a flavour in a dtype, or in fp64."""


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """A batch whose floating-point tensors have another dtype."""
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in batch.items()}


def step(
    flavour: Flavour, model: nn.Module, run: Callable[..., Any], batch: Batch
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of one step; random numbers are those of the global seed."""
    torch.manual_seed(0)
    flavour.before(model, 0)
    given = {name: value for name, value in batch.items() if name != "target"}
    with flavour.around(model, 0):
        output = run(**given)
        flavour.loss(output, batch).backward()
    grads = [
        torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for p in model.parameters()
        if p.requires_grad
    ]
    model.zero_grad(set_to_none=True)
    return [y.detach().clone() for y in tensors(output)], grads


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The norm of all errors over the norm of all exact values."""
    apart = sum(
        (one.double() - two.double()).square().sum().item()
        for one, two in zip(found, exact, strict=True)
    )
    return float((apart / max(sum(x.double().square().sum().item() for x in exact), 1e-300)) ** 0.5)


def measured(flavour: Flavour, dtype: torch.dtype) -> dict[str, Errors]:
    """By run, its errors.

    Raises:
        RefusedError: If eager mode fails. What fails under a backend only is raised as it is.
    """
    model = flavour.model().to(dtype)
    batch = cast(flavour.batch(), dtype)
    double, same = copy.deepcopy(model).double(), copy.deepcopy(model)
    try:
        exact = step(flavour, double, double, cast(batch, torch.float64))
        step(flavour, same, same, batch)
    except Exception as failure:
        raise RefusedError(f"{type(failure).__name__}: {failure}") from failure
    found = {}
    for name in RUNS:
        torch._dynamo.reset()
        mine = copy.deepcopy(model)
        with (
            inductor_config.patch({"fallback_random": True, "fx_graph_cache": False}),
            functorch_config.patch(enable_autograd_cache=False),
            torch._dynamo.config.patch(dict(flavour.dynamo)),
            without_kernels(Products()),
        ):
            run: Any = mine
            if name != "eager":
                options: Any = ours(**{"objective": "flops", **flavour.options})
                options = options if name == RUNLORA else None
                run = torch.compile(mine, backend=name, options=options)
            outputs, grads = step(flavour, mine, run, batch)
        found[name] = error(outputs, exact[0]), error(grads, exact[1])
    return found


def table(rows: dict[tuple[str, str], dict[str, Errors]], without: list[str]) -> str:
    """The table, and what has no row in it."""
    head = [
        f"{what}, {run}" for what in ("Y", "gradients") for run in ("eager", "Inductor", "ours")
    ]
    lines = [f"| flavour | dtype | {' | '.join(head)} |", "|---" * (2 + len(head)) + "|"]
    for (flavour, dtype), found in rows.items():
        cells = [f"{found[run][i]:.2g}" for i in (0, 1) for run in RUNS]
        lines.append(f"| {flavour} | {dtype} | {' | '.join(cells)} |")
    lines.append("")
    for i, what in enumerate(("outputs", "gradients")):
        for dtype in DTYPES:
            ratios = sorted(
                (found[RUNLORA][i] / max(found["eager"][i], 1e-300), flavour)
                for (flavour, kind), found in rows.items()
                if kind == dtype and found["eager"][i] > 0
            )
            if ratios:
                middle, (most, where) = ratios[len(ratios) // 2][0], ratios[-1]
                lines.append(
                    f"- {dtype}, {what}: our error over eager's is {middle:.2f} in the median, "
                    f"and at most {most:.2f} ({where})."
                )
    if without:
        reason = "since eager mode does not run them there or in fp64"
        lines += ["", f"Without a row, {reason}: {', '.join(without)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every flavour and replace the table of the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.rounding", description=__doc__)
    parser.add_argument("--flavour", action="append", choices=tuple(FLAVOURS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[tuple[str, str], dict[str, Errors]] = {}
    without = []
    for name in asked.flavour or FLAVOURS:
        flavour = FLAVOURS[name]
        if flavour.autocast is not None:  # it has a dtype of its own
            continue
        for dtype, kind in DTYPES.items():
            try:
                rows[name, dtype] = measured(flavour, kind)
            except RefusedError as failure:
                print(f"{name} {dtype}: {failure}"[:300], flush=True)
                without.append(f"{name} in {dtype}")
                continue
            print(name, dtype, rows[name, dtype], flush=True)
    by = table(rows, without)
    print(by)
    if asked.flavour is None:
        head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(head + BEGIN + by + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
