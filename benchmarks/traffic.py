"""What real recipes cost: bytes moved, kernels, FLOPs and bytes kept, counted without running.

    python benchmarks/traffic.py [CASE ...] [--scale 1] [--device h100]

Every case is one layer of a real model with LoRA on all of its projections. QLoRA's weights are
dequantised in the graph, by plain operators. A mixture of experts has adapters on its experts too.
A layer is compiled frozen under Inductor, with PEFT under Inductor, and with PEFT under runlora by
each policy. Forward and backward are compiled as far as Inductor's scheduler, which says what each
kernel reads and writes. Nothing is run and no tensor has data, so a full-size layer takes seconds.
``--scale 4`` divides widths, heads and tokens by four; there launches weigh more. Cases that are
not asked for keep the rows that an earlier run with the same settings left.

*Moved* is the sum over the kernels of what they read and write. *Kept* is what the forward leaves
for the backward, parameters and the layer's input apart. *Tax* is what the adapters add to the
frozen layer's bytes, as a share of what they add under PEFT + Inductor. *Roofline* is predicted
from these counts and published peaks: a kernel takes the longer of its bytes and its FLOPs. No
time is measured.

Invariant: equal versions of torch, PEFT and this package give equal numbers on every machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
from measuring.counts import Count, count_of
from plots import draw
from rich.progress import track

from runlora_fx.cli.layers import SHAPES, Recipe, model_of
from runlora_fx.cost_model.published import PUBLISHED

GB, MB = 1e9, 1e6

#: By variant, our options; None is Inductor's own backend.
POLICIES: dict[str, dict[str, Any] | None] = {
    "PEFT + Inductor": None,
    "runlora": {},
    'runlora, memory="low"': {"memory": "low"},
    # A budget that holds every merged weight.
    'runlora, memory="fast"': {"memory": "fast", "memory_budget": 1 << 40},
}


CASES: dict[str, Recipe] = {
    "no dropout": Recipe(),
    "dropout 0.05": Recipe(dropout=0.05),
    "autocast, fp32 adapters": Recipe(autocast=True),
    "autocast, dropout 0.05": Recipe(autocast=True, dropout=0.05),
    "DoRA": Recipe(dora=True),
    "checkpointing": Recipe(checkpointed=True),
    "checkpointing, dropout 0.05": Recipe(checkpointed=True, dropout=0.05),
    "rank 8": Recipe(rank=8),
    "rank 64": Recipe(rank=64),
    "rank 128": Recipe(rank=128),
    "512 tokens": Recipe(rows=1, length=512),
    "16384 tokens": Recipe(rows=8),
    "Qwen2.5-7B": Recipe(shape="Qwen2.5-7B"),
    "ViT-L": Recipe(shape="ViT-L", rows=32, length=256),
    "QLoRA": Recipe(quantised=True),
    "QLoRA, dropout 0.05": Recipe(quantised=True, dropout=0.05),
    "MoE": Recipe(shape="Mixtral-8x7B"),
}


def counted(
    recipe: Recipe, scale: int, options: Mapping[str, Any] | None, *, is_adapted: bool
) -> Count:
    """Compile a layer as far as Inductor's scheduler."""
    shape = SHAPES[recipe.shape].scaled(scale)
    model = model_of(recipe, shape, torch.device("meta"), is_adapted=is_adapted)
    length = recipe.length // scale
    x = torch.empty(recipe.rows, length, shape.width, dtype=torch.bfloat16, device="meta")
    positions = torch.empty(1, length, dtype=torch.long, device="meta")
    return count_of(model, (x.requires_grad_(), positions), options, autocast=recipe.autocast)


def rows(name: str, recipe: Recipe, scale: int, device: str) -> list[dict[str, Any]]:
    """The rows of one case: a mapping for each variant."""
    variants: dict[str, Count] = {"frozen": counted(recipe, scale, None, is_adapted=False)}
    for policy, options in POLICIES.items():
        chosen = None if options is None else {"strict": True, "device": device, **options}
        variants[policy] = counted(recipe, scale, chosen, is_adapted=True)
    frozen, baseline = variants["frozen"], variants["PEFT + Inductor"]
    return [
        {
            "case": name,
            "variant": variant,
            "moved_B": count.moved,
            "kept_B": count.kept,
            "flop": count.flops,
            "kernels": len(count.kernels),
            "tax": (count.moved - frozen.moved) / (baseline.moved - frozen.moved),
            "kept_over_frozen": count.kept / frozen.kept if frozen.kept else None,
            "roofline_ms": {n: count.milliseconds(d) for n, d in PUBLISHED.items()},
        }
        for variant, count in variants.items()
    ]


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Counts as Markdown."""
    lines = [
        "| case | variant | moved, GB | tax | kept, MB | kept / frozen | TFLOP | kernels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        kept = row["kept_over_frozen"]
        lines.append(
            f"| {row['case']} | {row['variant']} | {row['moved_B'] / GB:.3f} | {row['tax']:.2f} "
            f"| {row['kept_B'] / MB:.1f} | {'' if kept is None else f'{kept:.2f}'} "
            f"| {row['flop'] / 1e12:.3f} | {row['kernels']} |"
        )
    return "\n".join(lines)


def rooflines(found: Sequence[Mapping[str, Any]]) -> str:
    """Predicted times over those of PEFT + Inductor, as Markdown."""
    lines = [
        f"| case | variant | {' | '.join(PUBLISHED)} |",
        f"|---|---|{'---|' * len(PUBLISHED)}",
    ]
    base = {r["case"]: r["roofline_ms"] for r in found if r["variant"] == "PEFT + Inductor"}
    for row in found:
        ratios = (f"{t / base[row['case']][n]:.3f}" for n, t in row["roofline_ms"].items())
        lines.append(f"| {row['case']} | {row['variant']} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def main() -> None:
    """Count the cases that are asked for, and write table, data and plot."""
    parser = argparse.ArgumentParser(description="Bytes moved and kept, counted by Inductor.")
    parser.add_argument("cases", nargs="*", help="parts of names of cases; all if none")
    parser.add_argument("--scale", type=int, default=1, help="divide widths and tokens by this")
    parser.add_argument("--device", default="h100", help="the device to plan for")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    wanted = [
        name for name in CASES if not given.cases or any(part in name for part in given.cases)
    ]
    settings = {
        "torch": torch.__version__,
        "peft": peft.__version__,
        "scale": given.scale,
        "device": given.device,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    found = counted_before(given.out, settings)
    for name in track(wanted, description="counting"):
        found[name] = rows(name, CASES[name], given.scale, given.device)
        # After every case: a count that is cut short leaves what it has.
        text = written(found, settings, given.out)
    print(text)


def counted_before(folder: Path, settings: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows by case that an earlier run left, if its settings were the same."""
    file = folder / "traffic.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if any(content.get(name) != value for name, value in settings.items()):
        return {}
    known = [row for row in content["rows"] if row["case"] in CASES]
    cases = dict.fromkeys(row["case"] for row in known)
    return {name: [row for row in known if row["case"] == name] for name in cases}


def written(
    found: Mapping[str, list[dict[str, Any]]], settings: Mapping[str, Any], to: Path
) -> str:
    """Write the rows of all cases as Markdown, JSON and, where matplotlib is, a plot."""
    cases = [name for name in CASES if name in found]
    every = [row for name in cases for row in found[name]]
    timed = [row for row in every if not SHAPES[CASES[row["case"]].shape].experts]
    text = "\n\n".join(
        [
            f"Counted by Inductor's scheduler, torch {settings['torch']}, PEFT {settings['peft']}; "
            f"widths and tokens / {settings['scale']}; planned for {settings['device']}.",
            table(every),
            "TFLOP does not count the grouped products of experts, so no time is predicted for "
            "MoE. Rows that are missing were not counted.",
            "Predicted from counts (published peaks), relative to PEFT + Inductor:",
            rooflines(timed),
        ]
    )
    (to / "traffic.md").write_text(text + "\n", encoding="utf-8")
    recipes = {name: asdict(CASES[name]) for name in cases}
    content = {**settings, "recipes": recipes, "rows": every}
    (to / "traffic.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if find_spec("matplotlib") is not None:
        draw({**content, "rows": timed}, to / "traffic.svg")
    return text


if __name__ == "__main__":
    main()
