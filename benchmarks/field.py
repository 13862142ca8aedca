"""Where we stand: training and inference with LoRA, against PEFT, other libraries, and the floor.

    python benchmarks/field.py paper [CASE ...] [--rounds 20]
    python benchmarks/field.py recipes
    python benchmarks/field.py inference
    python benchmarks/field.py methods
    python benchmarks/field.py paper --contenders runlora 'runlora, tune="plans"'

One command makes one table: ``results/field_paper.json``, ``.md`` and ``.svg``. Sets of cases:

- ``paper``: the models of "Run LoRA Run" (arXiv 2312.03415), each cut to two layers.
- ``recipes``: a Llama-3-8B layer as people train it, widths and tokens divided by ``--scale``.
- ``inference``: the same layer without gradients, and mixed batches, whose samples have adapters of
  their own.
- ``methods``: a siamese encoder, cycles of ReLoRA, and optimizer steps of LoRA-Pro and Flora.

Contenders take their steps in turn, in one process, on the same weights and data. A case in which
one of them computes something else is refused. Those that tune take minutes to compile, and run if
``--contenders`` names them, in every set. Libraries that are not installed are listed with the
reason. Run ``python -m runlora_fx calibrate`` before: plans are then made for this machine. Nothing
else should run on it. Cases that are not asked for keep the results of an earlier run on the same
machine, versions and commit.

Invariant: data and weights are random. Times and bytes are measured, and what is counted says so.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measuring import contenders
from measuring.cases import SETS, Case
from measuring.compare import NotTheSame
from measuring.plot import draw
from measuring.run import about, measured
from measuring.shares import shares
from measuring.tables import heading, section

from runlora_fx.cost_model.devices.registry import fastest


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
    parser.add_argument(
        "--tokens", type=int, help="of the paper's models, one layer and at most so many tokens"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=[],
        metavar="NAME",
        help="PEFT + Inductor and these; all that compile fast if none. Only on request: "
        + ", ".join(f"'{name}'" for name in contenders.ON_REQUEST),
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(arguments)
    cases = dict(SETS[given.set](given.scale, given.tokens))
    if unknown := set(given.cases) - set(cases):
        parser.error(f"unknown cases {sorted(unknown)}; valid are {list(cases)}")
    named = (name for case in cases.values() for name in case.contenders)
    known = list(dict.fromkeys((*named, *contenders.ON_REQUEST)))
    if unknown := set(given.contenders) - set(known):
        parser.error(f"unknown contenders {sorted(unknown)}; valid are {known}")
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
    known = dict(case.contenders)
    if given.contenders:
        only = {*given.contenders, contenders.BASELINE}
        known = {n: c for n, c in (known | contenders.ON_REQUEST).items() if n in only}
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
