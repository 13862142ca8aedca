"""Where we stand: training and inference with LoRA, against PEFT, other libraries, and the floor.

    python benchmarks/field.py paper [CASE ...] [--rounds 20]
    python benchmarks/field.py recipes
    python benchmarks/field.py inference

One command makes one table: ``results/field_paper.json``, ``.md`` and ``.svg``. Sets of cases:

- ``paper``: the models of "Run LoRA Run" (arXiv 2312.03415), each cut to two layers.
- ``recipes``: a Llama-3-8B layer as people train it, widths and tokens divided by ``--scale``.
- ``inference``: the same layer without gradients.

Contenders take their steps in turn, in one process, on the same weights and data. A case in which
one of them computes something else is refused. Libraries that are not installed are listed with the
reason. Run ``python -m runlora_fx calibrate`` before: plans are then made for this machine. Nothing
else should run on it. Cases that are not asked for keep the results of an earlier run on the same
machine, versions and commit.

Invariant: data and weights are random. Times and bytes are measured, and what is counted says so.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import contenders, inference, models, recipes
from measuring.compare import NotTheSame
from measuring.plot import draw
from measuring.run import about, measured
from measuring.shares import shares
from measuring.steps import Contender, Task
from measuring.tables import heading, section

from runlora_fx.cli.layers import Recipe
from runlora_fx.cost_model.devices.registry import fastest


class Case(NamedTuple):
    """A case: what is said of it, what makes its task, and who runs it."""

    about: str
    make: Callable[[torch.device], Task]
    contenders: Mapping[str, Contender]


RECIPES: dict[str, Recipe] = {
    "no dropout": Recipe(),
    "dropout 0.05": Recipe(dropout=0.05),
    "autocast, fp32 adapters": Recipe(autocast=True),
    "autocast, dropout 0.05": Recipe(autocast=True, dropout=0.05),
    "rank 8": Recipe(rank=8),
    "DoRA": Recipe(dora=True),
    "QLoRA": Recipe(quantised=True),
    "checkpointing": Recipe(checkpointed=True),
    "MoE": Recipe(shape="Mixtral-8x7B"),
}


def paper(scale: int) -> dict[str, Case]:
    """The paper's models."""
    known = contenders.RECIPES | contenders.others()[0]
    return {
        name: Case(cut.about, partial(models.task_of, cut), known)
        for name, cut in models.PAPER.items()
    }


def trained(scale: int) -> dict[str, Case]:
    """A layer as people train it."""
    return {
        name: Case(
            f"{recipe.shape}, one layer, rank {recipe.rank}, bfloat16, {recipe.rows} x "
            f"{recipe.length // scale} tokens, widths / {scale}",
            partial(recipes.task_of, recipe, scale),
            contenders.RECIPES,
        )
        for name, recipe in RECIPES.items()
    }


def applied(scale: int) -> dict[str, Case]:
    """A layer without gradients."""
    return {
        name: Case(
            f"Llama-3-8B, one layer, rank 16, bfloat16, {rows} x {max(length // scale, 1)} tokens, "
            f"widths / {scale}",
            partial(inference.task, name, scale),
            contenders.INFERENCE,
        )
        for name, (rows, length, _) in inference.SHAPES.items()
    }


SETS: dict[str, Callable[[int], dict[str, Case]]] = {
    "paper": paper,
    "recipes": trained,
    "inference": applied,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases of a set, and write table, data and plot.

    Returns:
        The exit status: 1 if a case was refused or failed.
    """
    parser = argparse.ArgumentParser(description="Times of LoRA, against the field.")
    parser.add_argument("set", choices=SETS, help="of cases")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases; all if none")
    parser.add_argument("--device", type=torch.device, default=fastest())
    parser.add_argument("--scale", type=int, default=8, help="divide a layer's widths by this")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--contenders", nargs="+", default=[], help="PEFT + Inductor and these")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(arguments)
    cases = SETS[given.set](given.scale)
    if unknown := set(given.cases) - set(cases):
        parser.error(f"unknown cases {sorted(unknown)}; valid are {list(cases)}")
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / f"field_{given.set}.json"
    machine = about(given.device)
    left_out = contenders.others()[1] if given.set == "paper" else {}
    found = before(file, machine)
    for name in given.cases or list(cases):
        print(name, flush=True)
        found[name] = outcome(name, cases[name], given)
        ordered = [found[name] for name in cases if name in found]
        # After every case: a run that is cut short leaves what it has.
        text = write({"machine": machine, "left_out": left_out, "cases": ordered}, file)
    print(text)
    return int(any("refused" in found[name] for name in given.cases or list(cases)))


def outcome(name: str, case: Case, given: argparse.Namespace) -> dict[str, Any]:
    """The results of a case, or why there are none."""
    torch._dynamo.reset()
    gc.collect()
    only = {*given.contenders, contenders.BASELINE} if given.contenders else set(case.contenders)
    known = {name: made for name, made in case.contenders.items() if name in only}
    head = {"case": name, "about": case.about}
    try:
        task = case.make(given.device)
        # Counted first: it resets Dynamo, and with it what the contenders compile.
        counted = {"removable": shares(task)} if task.dy is not None else {}
        found = measured(task, known, given.rounds, partial(print, flush=True))
    except NotTheSame as wrong:
        return head | {"refused": f"not the same values: {wrong}"}
    except Exception as failed:  # such as that memory does not suffice: the other cases still run
        return head | {"refused": f"{type(failed).__name__}: {failed}"}
    return head | counted | found


def before(file: Path, machine: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The cases by name that an earlier run left, if it ran on the same."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if content.get("machine") != json.loads(json.dumps(machine)):
        return {}
    return {case["case"]: case for case in content["cases"]}


def write(results: Mapping[str, Any], file: Path) -> str:
    """Write JSON, Markdown and, where matplotlib is, a plot; the Markdown."""
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = [heading(results["machine"])]
    for case in results["cases"]:
        lines += section(case)
    if results["left_out"]:
        reasons = "; ".join(f"{name}: {why}" for name, why in results["left_out"].items())
        lines += ["", f"Not run: {reasons}."]
    text = "\n".join(lines) + "\n"
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    if find_spec("matplotlib") is not None:
        draw(results, file.with_suffix(".svg"))
    return text


if __name__ == "__main__":
    raise SystemExit(main())
