"""Gain: what typical recipes would gain on a device, before anything is run.

    Llama-3-8B, dropout 0.05    -1.2% time    1664 MB -> 747 MB saved    set lora_dropout=0 ...

Every row is one decoder layer with adapters on all projections. It is traced without data.

Invariant: times are predicted, FLOPs and saved bytes are counted. Nothing is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import fx

from runlora_fx.aot import Parts
from runlora_fx.cli.console import progress, quietly, results, status
from runlora_fx.cli.without_weights import META
from runlora_fx.cost_model.devices.machine import Machine
from runlora_fx.cost_model.devices.registry import entry_of, fastest
from runlora_fx.cost_model.published import title_of
from runlora_fx.options import Options
from runlora_fx.report.data import Report
from runlora_fx.trace import explained

#: From these shares on a gain is worth a line in a training script.
_WORTH_TIME, _WORTH_BYTES = 0.01, 0.05


@dataclass(frozen=True)
class Gain:
    """What one recipe gains.

    Attributes:
        layer: The model that the layer is of.
        recipe: How it is trained.
        time_change: Predicted change of the time of all matrix products, as a share; None if that
            is not known.
        flops: Of all matrix products, before and after [FLOP].
        saved: For the backward, before and after [B].
        advice: What to do.
    """

    layer: str
    recipe: str
    time_change: float | None
    flops: tuple[int, int]
    saved: tuple[int, int]
    advice: str


def run(device: str, layer: str | None, *, as_json: bool) -> int:
    """Explain all recipes, and print a table.

    Args:
        device: The option ``runlora.device``.
        layer: The model whose layer is explained; all of them if None.
        as_json: True to print JSON.

    Returns:
        The exit status: 0.

    Raises:
        ValueError: If the device is not known.
        SystemExit: If PEFT or Transformers is missing.
    """
    options = Options(device=device)
    try:
        with status("Importing PEFT and Transformers ..."), quietly():
            from runlora_fx.cli import layers
    except ImportError as error:
        message = "gain needs PEFT and Transformers: pip install 'runlora-fx[demo]'"
        raise SystemExit(f"{message} ({error})") from None
    cases = [case for case in _cases(layers) if layer in (None, case[1].shape)]
    with progress() as bar:
        task = bar.add_task("tracing and planning", total=len(cases))
        found = []
        for name, recipe, is_inference in cases:
            bar.update(task, description=f"{recipe.shape}, {name}")
            found.append(_gain(layers, name, recipe, options, is_inference=is_inference))
            bar.advance(task)
    if as_json:
        content = {"planned_for": _planned_for(device), "gains": [asdict(gain) for gain in found]}
        print(json.dumps(content, indent=1))
    else:
        _show(found, device)
    return 0


def _cases(layers: Any) -> Iterator[tuple[str, Any, bool]]:
    """Names, recipes, and if they are inference."""
    recipe = layers.Recipe
    for shape in ("Llama-3-8B", "SmolLM2-135M"):
        yield "no dropout", recipe(shape=shape), False
        yield "dropout 0.05", recipe(shape=shape, dropout=0.05), False
        yield "autocast, fp32 adapters", recipe(shape=shape, autocast=True), False
        yield "DoRA", recipe(shape=shape, dora=True), False
        yield "4-bit weights (QLoRA)", recipe(shape=shape, quantised=True), False
        yield "checkpointing", recipe(shape=shape, checkpointed=True), False
        yield "few tokens: 1 x 64", recipe(shape=shape, rows=1, length=64), False
        yield "inference, 1 x 2048", recipe(shape=shape, rows=1), True


def _gain(layers: Any, name: str, recipe: Any, options: Options, *, is_inference: bool) -> Gain:
    """Trace one layer."""
    shape = layers.SHAPES[recipe.shape]
    model = layers.model_of(recipe, shape, META, is_adapted=True)
    x = torch.empty(recipe.rows, recipe.length, shape.width, dtype=torch.bfloat16, device="meta")
    positions = torch.empty(1, recipe.length, dtype=torch.long, device="meta")
    cast: AbstractContextManager[Any] = nullcontext()
    if recipe.autocast:
        cast = torch.autocast("cpu", torch.bfloat16)
    came: list[int] = []
    runs: list[int] = []

    def compare(one: Parts, other: Parts) -> None:
        came.append(saved_bytes(one))
        runs.append(saved_bytes(other))

    with torch.set_grad_enabled(not is_inference), cast, quietly():
        given = (x.requires_grad_(not is_inference), positions)
        report = explained(model, given, {}, options, compare)
    time_change = None
    if report.seconds is not None and report.seconds[0]:
        time_change = report.seconds[1] / report.seconds[0] - 1
    flops = (report.flops_before, report.flops_after)
    saved = (sum(came), sum(runs))
    return Gain(recipe.shape, name, time_change, flops, saved, _advice(report, time_change, saved))


def saved_bytes(parts: Parts) -> int:
    """What a forward saves for the backward, inputs and parameters apart; each storage once [B].

    The states of random generators do not count. Their size is not known when a graph is traced.
    """
    outputs = parts.forward.graph.output_node().args[0]
    assert isinstance(outputs, Sequence)
    made = [
        node.meta["val"]
        for node in outputs[parts.results :]
        if isinstance(node, fx.Node) and node.op != "placeholder"
    ]
    tensors = [val for val in made if isinstance(val, torch.Tensor)]
    storages = {val.untyped_storage()._cdata: val.untyped_storage().nbytes() for val in tensors}
    return sum(size for size in storages.values() if isinstance(size, int))


def _advice(report: Report, time_change: float | None, saved: tuple[int, int]) -> str:
    """What to do, in a few words."""
    remedies = dict.fromkeys(cause.remedy for site in report for cause in site.causes)
    if remedies:
        return next(iter(remedies))
    is_quicker = time_change is not None and -time_change >= _WORTH_TIME
    is_smaller = saved[0] > 0 and 1 - saved[1] / saved[0] >= _WORTH_BYTES
    words = [name for name, holds in (("time", is_quicker), ("memory", is_smaller)) if holds]
    return f"use it: saves {' and '.join(words)}" if words else "little to gain"


def _planned_for(device: str) -> str:
    """What was planned for, and where its rates are from."""
    if device:
        return title_of(device)
    here = fastest()
    is_calibrated = bool(Machine(use_stored=True).record(here, "bfloat16").seconds_per)
    source = "measured by `runlora calibrate`" if is_calibrated else "estimated, not calibrated"
    return f"this machine, {entry_of(here).model(here)} (rates {source})"


def _show(found: Sequence[Gain], device: str) -> None:
    table = Table(
        title="One decoder layer in bfloat16, LoRA of rank 16 on all projections, 4 x 2048 tokens "
        "if not said otherwise",
        title_justify="left",
    )
    for column in ("layer", "recipe", "time, predicted", "saved, counted", "FLOPs, counted"):
        table.add_column(column, justify="left" if column in ("layer", "recipe") else "right")
    # Wide enough for the longest name of an option.
    table.add_column("advice", width=24)
    name = ""
    for gain in found:
        change = "" if gain.time_change is None else f"{gain.time_change:+.1%}"
        shown = gain.layer if gain.layer != name else ""
        if shown and name:
            table.add_section()
        saved, flops = _megabytes(gain.saved), _teraflops(gain.flops)
        table.add_row(shown, gain.recipe, change, saved, flops, gain.advice)
        name = gain.layer
    console = results()
    console.print(table)
    console.print(
        f"Planned for {_planned_for(device)}. Time: of all matrix products. Saved: by the forward "
        "for the backward, under Inductor -> under runlora."
    )


def _megabytes(saved: tuple[int, int]) -> str:
    return f"{saved[0] / 1e6:.1f} -> {saved[1] / 1e6:.1f} MB" if any(saved) else "nothing"


def _teraflops(flops: tuple[int, int]) -> str:
    return f"{flops[0] / 1e12:.4g} -> {flops[1] / 1e12:.4g} T"
