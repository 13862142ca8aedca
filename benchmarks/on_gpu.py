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
import copy
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
from on_gpu_kernels import measured
from on_gpu_tables import markdown
from torch import Tensor, nn

import runlora_fx
from runlora_fx.cli.layers import SHAPES, Recipe, model_of
from runlora_fx.cost_model.devices.machine import key_of
from runlora_fx.cost_model.devices.peak import peak_bytes, peak_source
from runlora_fx.cost_model.devices.registry import entry_of, fastest

BASELINE = "PEFT + Inductor"
EAGER = "PEFT, eager"

#: What a relative error may be beyond twice that of eager PEFT, and at all where masks are drawn.
TOLERANCE, MASKED_TOLERANCE = 0.01, 0.05


@dataclass(frozen=True)
class Contender:
    """One way to run a case.

    Attributes:
        backend: Of ``torch.compile``; None is eager mode.
        options: Of the backend.
        is_adapted: Whether the layer has adapters.
    """

    backend: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    is_adapted: bool = True


def ours(**options: Any) -> Contender:
    """A contender with our backend."""
    return Contender("runlora", {f"runlora.{name}": value for name, value in options.items()})


AUTOTUNED = {"max_autotune": True}

#: A budget that holds every merged weight.
FAST = ours(memory="fast", memory_budget=1 << 40)

FROZEN = Contender("inductor", is_adapted=False)
CONTENDERS: dict[str, Contender] = {
    "frozen, Inductor": FROZEN,
    EAGER: Contender(None),
    BASELINE: Contender("inductor"),
    "runlora": ours(),
    'runlora, memory="low"': ours(memory="low"),
    'runlora, memory="fast"': FAST,
}
#: Products are tuned, CUDA graphs are not used.
TUNED: dict[str, Contender] = {
    BASELINE: Contender("inductor"),
    "PEFT + Inductor, max-autotune": Contender("inductor", AUTOTUNED),
    "runlora": ours(),
    "runlora, max-autotune": Contender("runlora", AUTOTUNED),
}

#: By name: the recipe, and who runs it. The first are the most important.
CASES: dict[str, tuple[Recipe, dict[str, Contender]]] = {
    "no dropout": (Recipe(), CONTENDERS),
    "dropout 0.05": (Recipe(dropout=0.05), CONTENDERS),
    "autocast, fp32 adapters": (Recipe(autocast=True), CONTENDERS),
    "DoRA": (Recipe(dora=True), CONTENDERS),
    "no dropout, max-autotune": (Recipe(), TUNED),
    "checkpointing": (Recipe(checkpointed=True), CONTENDERS),
}


class NotTheSame(Exception):
    """A contender computes something else than the reference."""


class Step:
    """A training step of one contender: forward and backward, without an optimizer."""

    def __init__(self, contender: Contender, model: nn.Module, data: Data, recipe: Recipe) -> None:
        """Take a model; the first step compiles it."""
        self.model, self.data = model, data
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.device = data.x.device
        self.autocast = recipe.autocast
        if contender.backend is not None:
            model.compile(
                backend=contender.backend, dynamic=False, options=dict(contender.options) or None
            )

    def __call__(self) -> Tensor:
        """The output; gradients are left on the adapters and on the input."""
        self.release()
        cast: Any = nullcontext()
        if self.autocast:
            cast = torch.autocast(self.device.type, torch.bfloat16)
        with cast:
            y: Tensor = self.model(self.data.x, self.data.positions)
        y.backward(self.data.dy.to(y.dtype))
        return y.detach()

    def release(self) -> None:
        """Drop the gradients of the last step."""
        self.data.x.grad = None
        for weight in self.trained:
            weight.grad = None

    def values(self) -> list[Tensor]:
        """The output and all gradients in float32, at a fixed seed."""
        torch.manual_seed(1)
        y = self()
        found = [y, self.data.x.grad, *(weight.grad for weight in self.trained)]
        return [t.detach().float() for t in found if t is not None]

    def seconds(self) -> float:
        """The time of one step [s]."""
        synchronise = entry_of(self.device).synchronise
        synchronise(self.device)
        start = time.perf_counter()
        self()
        synchronise(self.device)
        return time.perf_counter() - start


@dataclass
class Data:
    """The input of a layer, its positions, and the gradient of its output."""

    x: Tensor
    positions: Tensor
    dy: Tensor

    def float(self) -> Data:
        """The same numbers in float32."""
        x = self.x.detach().float().requires_grad_()
        return Data(x, self.positions, self.dy.float())


def adapted_and_frozen(
    recipe: Recipe, scale: int, device: torch.device
) -> tuple[nn.Module, nn.Module, Data]:
    """A layer with adapters, one without, and data; all random."""
    torch.manual_seed(0)
    shape, length = SHAPES[recipe.shape].scaled(scale), max(1, recipe.length // scale)
    frozen = model_of(recipe, shape, device, is_adapted=False)
    adapted = model_of(recipe, shape, device, is_adapted=True)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:  # PEFT starts with zeros, whose gradients say little
            nn.init.normal_(weight, std=0.02)
    size = (recipe.rows, length, shape.width)
    x, dy = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(2))
    positions = torch.arange(length, device=device)[None]
    return adapted, frozen, Data(x.requires_grad_(), positions, dy)


def copy_of(model: nn.Module) -> nn.Module:
    """A model with adapters of its own; frozen weights are shared."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    made: nn.Module = copy.deepcopy(model, shared)
    return made


def error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative error of the tensors."""
    return max(
        float((a - b).norm() / b.norm().clamp_min(1e-30))
        for a, b in zip(found, wanted, strict=True)
    )


class Case:
    """One recipe, run by its contenders."""

    def __init__(
        self, name: str, scale: int, device: torch.device, rounds: int, only: Sequence[str]
    ) -> None:
        """Make weights and data."""
        self.name, self.rounds, self.device = name, rounds, device
        self.recipe, contenders = CASES[name]
        self.contenders = {
            n: c for n, c in contenders.items() if not only or n in only or n == BASELINE
        }
        self.adapted, self.frozen, self.data = adapted_and_frozen(self.recipe, scale, device)

    def run(self, log: Callable[[str], None]) -> dict[str, Any]:
        """Compile, compare and time all contenders.

        Raises:
            NotTheSame: If one computes something else.
        """
        rows: dict[str, dict[str, Any]] = {}
        steps: dict[str, Step] = {}
        values: dict[str, list[Tensor]] = {}
        for name, contender in self.contenders.items():
            model = copy_of(self.adapted if contender.is_adapted else self.frozen)
            step = Step(contender, model, self.data, self.recipe)
            start = time.perf_counter()
            found = step.values()
            rows[name] = {"first_step_s": time.perf_counter() - start}
            if contender.is_adapted:
                values[name] = found
            report = runlora_fx.last_report() if contender.backend == "runlora" else None
            if report is not None and not report.from_cache:
                rows[name]["changed_sites"] = sum(site.changed for site in report.sites)
            step()
            step.release()
            rows[name]["peak_B"] = peak_bytes(step, self.device)
            steps[name] = step
            log(f"  {name}: first step {rows[name]['first_step_s']:.1f} s")
        self.compare(values, rows)
        times: dict[str, list[float]] = {name: [] for name in steps}
        turns = list(steps.items())
        for _ in range(self.rounds):
            turns.append(turns.pop(0))  # none always follows the same one
            for name, step in turns:
                times[name].append(step.seconds())
        for name, taken in times.items():
            ratios = [a / b for a, b in zip(taken, times[BASELINE], strict=True)]
            rows[name] |= {
                "median_s": median(taken),
                "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
            }
        return {"case": self.name, "rounds": self.rounds, "contenders": rows}

    def compare(
        self, values: Mapping[str, list[Tensor]], rows: Mapping[str, dict[str, Any]]
    ) -> None:
        """Compare outputs and gradients with the reference, and note the errors.

        Raises:
            NotTheSame: If an error is too large.
        """
        allowed = MASKED_TOLERANCE
        wanted = values[BASELINE]
        if not self.recipe.dropout:
            exact = copy.deepcopy(self.adapted).float()
            recipe = Recipe(checkpointed=self.recipe.checkpointed)
            wanted = Step(Contender(None), exact, self.data.float(), recipe).values()
            eager = Step(Contender(None), copy_of(self.adapted), self.data, self.recipe).values()
            allowed = 2 * error(eager, wanted) + TOLERANCE
        for name, found in values.items():
            if self.recipe.dropout and name == EAGER:
                continue
            rows[name]["error"] = wrong = error(found, wanted)
            if not wrong <= allowed:
                raise NotTheSame(f"{name}: relative error {wrong:.3g}, allowed {allowed:.3g}")


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


def about(device: torch.device, scale: int) -> dict[str, Any]:
    """What was run on."""
    key = key_of(device, "bfloat16")
    found = {**key._asdict(), "peft": peft.__version__, "scale": scale}
    found |= {"runlora_fx": runlora_fx.__version__, "cuda": torch.version.cuda}
    found["peak"] = peak_source(device)
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
    results: dict[str, Any] = {"machine": about(given.device, given.scale), "cases": []}
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
    results["kernels"] = list(measured(given.device, given.scale, end))
    results["took_s"] = time.monotonic() - start
    print(write(results, given.out))
    return int(any("refused" in case for case in results["cases"]))


def outcome(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """The results of a case, or why there are none."""
    torch._dynamo.reset()
    gc.collect()
    try:
        case = Case(name, given.scale, given.device, given.rounds, given.contenders)
        return case.run(lambda line: print(line, flush=True))
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
