"""What a training step takes on this machine's GPU, against PEFT and Inductor.

    benchmarks/on_gpu.sh [CASE ...] [--out FOLDER] [--seconds 420]

Every case is one Llama-3-8B layer with random weights and LoRA on all of its projections, 4 x 2048
tokens in bfloat16, forward and backward. The contenders of a case share weights and data, and take
their steps in turn in one process. A ratio is the median over the rounds of a contender's time over
that of PEFT + Inductor in the same round. ``--scale 32`` divides widths, heads and tokens, so that
it also runs on a CPU.

Nothing is believed that does not compute the same. Without dropout, outputs and gradients are
compared with eager PEFT in float32: a contender may err by twice what eager PEFT errs in bfloat16.
With dropout they are compared with PEFT + Inductor at the same seed, because eager mode draws other
masks. A case with a contender that fails is refused: its times are not written.

It starts with ``python -m runlora_fx calibrate``, so plans are made for this machine. No case is
started that would take longer than what is left of ``--seconds``; those are listed as not run.
Results are written after each case, as JSON and Markdown. The fused kernels are timed at the end.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring.compare import NotTheSame
from measuring.contenders import BASELINE, RECIPES, TUNED
from measuring.recipes import task_of
from measuring.run import about, measured
from measuring.steps import Contender
from on_gpu_kernels import measured as measured_kernels
from on_gpu_tables import markdown

from runlora_fx.cli.layers import Recipe
from runlora_fx.cost_model.devices.registry import fastest

#: By name: the recipe, and who runs it. The first are the most important.
CASES: dict[str, tuple[Recipe, dict[str, Contender]]] = {
    "no dropout": (Recipe(), RECIPES),
    "dropout 0.05": (Recipe(dropout=0.05), RECIPES),
    "autocast, fp32 adapters": (Recipe(autocast=True), RECIPES),
    "DoRA": (Recipe(dora=True), RECIPES),
    "no dropout, max-autotune": (Recipe(), TUNED),
    "checkpointing": (Recipe(checkpointed=True), RECIPES),
}


def calibrate(device: torch.device, seconds: float, to: Path) -> dict[str, Any]:
    """Measure this machine's profile with the command, and export it."""
    if not seconds:
        return {"ran": False}
    profile = to / "profile.json"
    command = [sys.executable, "-m", "runlora_fx", "calibrate", "--device", str(device)]
    command += ["--seconds", str(seconds), "--export", str(profile)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stdout.write(done.stdout + done.stderr)
    return {"ran": True, "status": done.returncode, "output": done.stdout}


def machine(device: torch.device, scale: int) -> dict[str, Any]:
    """What was run on."""
    found = about(device) | {"scale": scale}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv"]
        try:
            found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout
        except OSError:
            found["nvidia_smi"] = "not found"
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate, run the cases, write what was found.

    Returns:
        The exit status: 1 if a case was refused or failed.
    """
    parser = argparse.ArgumentParser(description="Times of LoRA layers on this machine.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--device", type=torch.device, default=fastest())
    parser.add_argument("--scale", type=int, default=1, help="divide widths and tokens by this")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=420.0, help="the time for all of it")
    parser.add_argument("--calibrate", type=float, default=60.0, help="seconds; 0 leaves it out")
    parser.add_argument("--contenders", nargs="+", default=[], help="PEFT + Inductor and these")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(arguments)
    if unknown := set(given.cases) - set(CASES):
        parser.error(f"unknown cases {sorted(unknown)}; valid are {list(CASES)}")
    start, longest = time.monotonic(), 0.0
    given.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(given.device, given.scale), "cases": []}
    results["calibration"] = calibrate(given.device, given.calibrate, given.out)
    waiting = given.cases or list(CASES)
    while waiting and time.monotonic() + longest < start + given.seconds:
        name = waiting.pop(0)
        print(name, flush=True)
        began = time.monotonic()
        results["cases"].append(outcome(name, given))
        longest = max(longest, time.monotonic() - began)
        write(results | {"not_run": waiting}, given.out)
    results["not_run"] = waiting
    end = start + given.seconds + 30.0  # seconds are enough for them
    results["kernels"] = list(measured_kernels(given.device, given.scale, end))
    results["took_s"] = time.monotonic() - start
    print(write(results, given.out))
    return int(any("refused" in case for case in results["cases"]))


def flushed(line: str) -> None:
    """Print at once: a run that is cut short has said what it was doing."""
    print(line, flush=True)


def outcome(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """The results of a case, or why there are none."""
    torch._dynamo.reset()
    gc.collect()
    recipe, known = CASES[name]
    only = {*given.contenders, BASELINE} if given.contenders else set(known)
    contenders = {name: contender for name, contender in known.items() if name in only}
    try:
        task = task_of(recipe, given.scale, given.device)
        return {"case": name} | measured(task, contenders, given.rounds, flushed)
    except NotTheSame as wrong:
        return {"case": name, "refused": f"not the same values: {wrong}"}
    except Exception as failed:  # such as that memory does not suffice: the other cases still run
        return {"case": name, "refused": f"{type(failed).__name__}: {failed}"}


def write(results: Mapping[str, Any], to: Path) -> str:
    """Write JSON and Markdown into a folder; the Markdown."""
    (to / "on_gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = markdown(results)
    (to / "on_gpu.md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    raise SystemExit(main())
