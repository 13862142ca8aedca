"""Runs: one task by all of its contenders, from the first step to the ratios.

    measured(task, {"PEFT + Inductor": ..., "runlora": ...}, rounds=20)    ->  a mapping for JSON

Invariant: times are written only if every contender computes the same.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.autograd.graph import saved_tensors_hooks

import runlora_fx
from measuring.compare import compared
from measuring.contenders import BASELINE, FROZEN
from measuring.quantised import constants
from measuring.steps import Contender, Step, Task
from measuring.turns import Ratio, take_turns
from runlora_fx.cost_model.devices.machine import key_of
from runlora_fx.cost_model.devices.peak import peak_bytes, peak_source


def measured(
    task: Task,
    contenders: Mapping[str, Contender],
    rounds: int,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compile, compare and time the contenders of a task.

    Args:
        task: What they run.
        contenders: By name; PEFT + Inductor must be among them.
        rounds: How many steps of each are timed.
        log: Is told what was compiled.

    Returns:
        For each contender what was measured: times [s], bytes [B], ratios to PEFT + Inductor, and
        the share of the tax that it removes if the frozen model is among the contenders.

    Raises:
        NotTheSame: If one computes something else.
    """
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    values: dict[str, list[Tensor]] = {}
    for name, contender in contenders.items():
        # Contenders share code, and Dynamo would count them as versions of one function.
        counters.clear()
        with fresh_cache():  # else the first to need a kernel would compile it for the others
            start = time.perf_counter()
            step = Step(contender, task)
            found = step.values()
            rows[name] = {"first_step_s": time.perf_counter() - start}
        if contender.is_adapted:
            values[name] = found
        if str(contender.backend).startswith("runlora"):
            rows[name] |= _planned(runlora_fx.last_report())
        step()
        rows[name]["graphs"] = counters["stats"]["unique_graphs"]
        model = step.model
        inside = (*model.parameters(), *model.buffers(), *constants(model), *task.inputs)
        rows[name]["kept_B"] = kept_bytes(step, inside) if task.dy is not None else 0
        step.release()
        rows[name]["peak_B"] = peak_bytes(step, task.device)
        steps[name] = step
        log(f"  {name}: first step {rows[name]['first_step_s']:.1f} s")
    for name, wrong in compared(task, values).items():
        rows[name]["error"] = wrong
    counters.clear()
    times = take_turns({name: step.seconds for name, step in steps.items()}, rounds)
    recompiled = counters["stats"]["unique_graphs"]
    for name, taken in times.items():
        ratio = asdict(Ratio.of(taken, times[BASELINE]))
        rows[name] |= {"median_s": median(taken), "times_s": taken, "ratio": ratio}
        if FROZEN in times and name not in (FROZEN, BASELINE):
            rows[name]["tax_removed"] = _removed(taken, times)
    return {"rounds": rounds, "recompiled": recompiled, "contenders": rows}


def _planned(report: runlora_fx.Report | None) -> dict[str, Any]:
    """What our report says: how many sites there are and changed, and how long planning took."""
    if report is None or report.from_cache:
        return {}
    changed = sum(site.changed for site in report.sites)
    return {
        "sites": len(report.sites),
        "changed_sites": changed,
        "planning_s": report.planning_seconds,
    }


def _removed(taken: list[float], times: Mapping[str, list[float]]) -> float:
    """The share of what the adapters take beyond the frozen model that is not taken."""
    tax = median(a - b for a, b in zip(times[BASELINE], times[FROZEN], strict=True))
    saved = median(a - b for a, b in zip(times[BASELINE], taken, strict=True))
    return saved / tax


def kept_bytes(run: Callable[[], Any], inside: Iterable[Tensor]) -> int:
    """What a forward keeps for its backward; each storage once [B].

    Args:
        run: Runs the forward; it may run the backward too.
        inside: Weights and inputs, which are there anyway and do not count.
    """
    known = {t.untyped_storage().data_ptr() for t in inside}
    saved: dict[int, Tensor] = {}  # holds them, so that no address is used twice

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        result = run()
    del result
    return sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in known)


def about(device: torch.device) -> dict[str, Any]:
    """What was run on: machine, versions, commit."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return {
        **key_of(device, "bfloat16")._asdict(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "runlora_fx": runlora_fx.__version__,
        "commit": done.stdout.strip() or "unknown",
        "cuda": torch.version.cuda,
        "peak": peak_source(device),
    }
