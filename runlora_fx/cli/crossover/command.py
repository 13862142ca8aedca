"""The command `runlora crossover`: fields, plans, break-evens and measured times of one layer.

    runlora crossover --in 4096 --out 4096 --rank 16 --device h100

Invariant: every number is called counted, predicted or measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from runlora_fx.cli.console import progress, results
from runlora_fx.cli.crossover import drawing, picture
from runlora_fx.cli.crossover.borders import Border, borders
from runlora_fx.cli.crossover.contenders import Contender, contenders, winners
from runlora_fx.cli.crossover.fields import Basis, Field, Layer, axes, field_of
from runlora_fx.cli.crossover.timed import Timed, timed
from runlora_fx.cost_model.devices.elsewhere import machine_for
from runlora_fx.cost_model.devices.machine import Machine
from runlora_fx.cost_model.devices.registry import entry_of, fastest
from runlora_fx.cost_model.published import title_of
from runlora_fx.options import Options
from runlora_fx.passes.tune.pricing import Pricing


def run(
    layer: Layer,
    rank: int,
    device: str,
    tokens_max: int,
    memory: str,
    *,
    measure: bool,
    save: Path | None,
    as_json: bool,
) -> int:
    """Find the plans that win, and show them.

    Args:
        layer: The layer.
        rank: The rank that formulas are filled in for.
        device: The option ``runlora.device``.
        tokens_max: The most tokens.
        memory: The option ``runlora.memory``.
        measure: True to time the products of the plans on this machine.
        save: A file to draw the fields into; none if None.
        as_json: True to print JSON.

    Returns:
        The exit status: 0.

    Raises:
        ValueError: If an argument is not valid.
    """
    tokens, ranks = axes(layer, rank, tokens_max)
    if measure and device:
        raise ValueError("--measure times this machine; leave --device out")
    if save is not None:
        drawing.check(save)
    chosen = _bases(layer, device, memory)
    with progress() as bar:
        task = bar.add_task("searching plans", total=len(chosen) * len(ranks))
        fields = [
            field_of(layer, basis, tokens, ranks, lambda: bar.advance(task)) for basis in chosen
        ]
        known = contenders(fields)
        found = {field.basis.title: borders(field, known, rank) for field in fields}
        measured: list[Timed] = []
        if measure:
            measured = timed(
                *(fields[-1], known, rank, fastest()),
                lambda items, what: bar.track(items, description=what),
            )
    if save is not None:
        drawing.draw(fields, known, save)
    if as_json:
        print(json.dumps(_as_json(fields, known, found, measured, rank), indent=1))
    else:
        _show(fields, known, found, measured, rank)
    return 0


def _bases(layer: Layer, device: str, memory: str) -> list[Basis]:
    """What plans are compared by: FLOPs, the device's times, and this machine's if measured."""
    counted = _objective("flops", "", memory, layer.dtype)
    found = [Basis("FLOPs", "counted", counted)]
    if device:
        timed = _objective("time", device, memory, layer.dtype)
        found.append(Basis(f"time on {title_of(device)}", "predicted", timed))
    here = fastest()
    is_calibrated = bool(Machine(use_stored=True).record(here, layer.dtype).seconds_per)
    if is_calibrated or not device:
        source = "predicted from rates that `runlora calibrate` measured"
        if not is_calibrated:
            source = "predicted from estimated rates; `runlora calibrate` measures them"
        timed = _objective("time", "", memory, layer.dtype)
        found.append(Basis(f"time on this machine, {entry_of(here).model(here)}", source, timed))
    return found


def _objective(name: Any, device: str, memory: Any, dtype: str) -> Any:
    """The objective that the pass ranks plans by, under some options."""
    options = Options(objective=name, device=device, memory=memory)
    machine = machine_for(device, use_stored=True)
    return Pricing(options, machine, torch.device("cpu") if device else fastest()).objective(dtype)


def _show(
    fields: Sequence[Field],
    known: Sequence[Contender],
    found: dict[str, list[Border]],
    measured: Sequence[Timed],
    rank: int,
) -> None:
    console = results()
    layer = fields[0].layer
    console.print(
        f"Which plan wins for a LoRA layer of {layer.inputs} inputs and {layer.outputs} outputs in "
        f"{layer.dtype}, in a training step (scaling 2, no dropout)?\n"
    )
    shown = [picture.picture(field, known, rank) for field in fields]
    console.print(picture.arranged(shown, console))
    console.print(picture.plans_table(known, layer.problem(fields[0].tokens[-1], rank)))
    if any(found.values()):
        console.print(picture.borders_table(found, rank))
    if measured:
        console.print(picture.timed_table(measured))


def _as_json(
    fields: Sequence[Field],
    known: Sequence[Contender],
    found: dict[str, list[Border]],
    measured: Sequence[Timed],
    rank: int,
) -> dict[str, Any]:
    problem = fields[0].layer.problem(fields[0].tokens[-1], rank)
    return {
        "layer": asdict(fields[0].layer),
        "rank": rank,
        "plans": [
            {
                "letter": contender.letter,
                "title": contender.title,
                "steps": contender.steps(problem).splitlines(),
                "flops": str(contender.flops(problem)),
                "run_lora_run": contender.variants.split(", "),
            }
            for contender in known
        ],
        "fields": [
            {
                "compared_by": field.basis.title,
                "source": field.basis.source,
                "tokens": field.tokens,
                "ranks": field.ranks,
                "winners": winners(field, known),
                "merging_pays": field.break_even(rank),
                "borders": [asdict(border) for border in found[field.basis.title]],
            }
            for field in fields
        ],
        "measured": [
            {**asdict(point), "fastest": point.fastest, "source": "measured products"}
            for point in measured
        ],
    }
