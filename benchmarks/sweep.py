"""How good are the chosen plans? Every plan of a LoRA layer, timed against the chosen one.

For a sample of layers (tokens, in, out, rank), in fp32 and bf16, forward only and with the
backward, all plans that no other dominates in FLOPs, bytes and kernels at once are run on random
data, in turn, several rounds. *Regret* is how much slower the chosen plan is than the fastest.
Plans run operator by operator, with forward and backward partitioned as under Inductor: the matrix
products are the very calls that Inductor makes, elementwise additions are not fused.

    python -m runlora_fx calibrate
    python benchmarks/sweep.py

takes about 12 seconds for each layer on 2 CPU cores (``--layers``). It writes ``sweep.json`` and
``sweep.md`` after every layer, so that it can be cut short. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx, nn

from runlora_fx._torch_compat import partitioned
from runlora_fx.backend import aot_backend
from runlora_fx.cost_model.devices.machine import Machine, key_of
from runlora_fx.cost_model.devices.measure import seconds, undisturbed
from runlora_fx.cost_model.objective import Objective
from runlora_fx.cost_model.ops import MatMul
from runlora_fx.options import Options
from runlora_fx.passes.algebra.plan import Plan
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.emit.apply import apply
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.read.analysis import Analysis
from runlora_fx.passes.search.decide import decide
from runlora_fx.passes.search.frontiers import search
from runlora_fx.passes.search.ways import Ways
from runlora_fx.passes.tune.pricing import Pricing

TOKENS = (16, 64, 256, 1024, 4096, 8192)
WIDTHS = ((256, 256), (768, 768), (640, 1720), (1024, 4096), (4096, 1024), (4096, 4096))
RANKS = (1, 8, 32, 128, 512)
DTYPES = ("float32", "bfloat16")

#: Layers whose base products take longer are left out, to keep the sweep short [s].
MAX_SECONDS = 0.05

#: How long all plans of a layer are timed, if that allows more rounds than were asked for [s].
BUDGET_SECONDS = 8.0

#: How the operands of ``X W'`` and of ``dY W`` lie.
NT = (False, True)
NN = (False, False)

AS_IT_CAME = "as it came"


@dataclass(frozen=True)
class Layer:
    """A LoRA layer and how it is used."""

    tokens: int
    inputs: int
    outputs: int
    rank: int
    dtype: str
    backward: bool


@dataclass
class Result:
    """What was measured for a layer.

    Attributes:
        layer: The layer.
        times: By plan, the least of some medians [s]; ``as it came`` is measured twice.
        again: The second time of the graph as it came [s].
        chosen: By policy, the plan it chooses.
    """

    layer: Layer
    times: dict[str, float]
    again: float
    chosen: dict[str, str] = field(default_factory=dict)

    def regret(self, policy: str) -> float:
        """How much slower the chosen plan is than the fastest, as a share."""
        return self.times[self.chosen[policy]] / min(self.times.values()) - 1

    def slower(self, policy: str) -> float:
        """How much slower the chosen plan is than the graph as it came, as a share."""
        return self.times[self.chosen[policy]] / self.times[AS_IT_CAME] - 1

    @property
    def noise(self) -> float:
        """How far apart two measurements of the same graph are, as a share."""
        return abs(self.again / self.times[AS_IT_CAME] - 1)


class Lora(nn.Module):
    """``x W' + 2 (x A') B'``."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.base = nn.Linear(layer.inputs, layer.outputs, bias=False)
        self.down = nn.Linear(layer.inputs, layer.rank, bias=False)
        self.up = nn.Linear(layer.rank, layer.outputs, bias=False)
        self.base.requires_grad_(False)
        self.to(getattr(torch, layer.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for x (tokens, in)."""
        result: Tensor = self.base(x) + 2.0 * self.up(self.down(x))
        return result


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description="Regret of the chosen plans of LoRA layers.")
    parser.add_argument("--layers", type=int, default=60, help="how many layers to sample")
    parser.add_argument("--rounds", type=int, default=5, help="how often to time each plan")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    given.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for layer in track(list(sample(given.layers, device)), "timing plans"):
        results.append(measured(layer, device, given.rounds))
        # After every layer: a sweep that is cut short leaves what it has.
        table = written(results, device, given.out)
    print(table)


def written(results: list[Result], device: torch.device, to: Path) -> str:
    """Write the measurements and their summary to a folder; the summary."""
    content = {
        "machine": [key_of(device, dtype)._asdict() for dtype in DTYPES],
        "results": [asdict(result) for result in results],
    }
    (to / "sweep.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = summary(results, key_of(device, "float32").device)
    (to / "sweep.md").write_text(table, encoding="utf-8")
    return table


def sample(count: int, device: torch.device) -> Iterator[Layer]:
    """A fixed random choice of layers, of those that a device computes in reasonable time."""
    machine = Machine(use_stored=True)
    layers = [
        Layer(n, i, o, r, dtype, backward)
        for n, (i, o), r, dtype, backward in product(TOKENS, WIDTHS, RANKS, DTYPES, (False, True))
        if r < min(i, o)
    ]
    random.Random(0).shuffle(layers)
    for layer in layers:
        profile = machine.profile(device, layer.dtype)
        if count and sum(map(profile.seconds, base_products(layer))) <= MAX_SECONDS:
            count -= 1
            yield layer


def base_products(layer: Layer) -> list[MatMul]:
    """The products with the frozen weight: ``X W'`` and, with a backward, ``dY W``."""
    n, i, o = layer.tokens, layer.inputs, layer.outputs
    itemsize = getattr(torch, layer.dtype).itemsize
    forward, backward = MatMul(1, n, i, o, itemsize, NT), MatMul(1, n, o, i, itemsize, NN)
    return [forward, backward] if layer.backward else [forward]


def measured(layer: Layer, device: torch.device, rounds: int) -> Result:
    """Time all plans of a layer."""
    gm = incoming_graph(layer, device)
    analysis = Analysis(gm.graph, ATEN)
    (problem,) = [p.problem for p in analysis.posed]
    policies = objectives(problem, device)
    plans = candidates(problem, list(policies.values()))
    runs = {name: runnable(gm, plan, layer.backward) for name, plan in plans.items()}
    again = runnable(gm, None, layer.backward)
    times: dict[str, list[float]] = {name: [] for name in (*runs, "again")}
    turns = [*runs.items(), ("again", again)]
    started = monotonic()
    with undisturbed(device):
        while len(times["again"]) < rounds or monotonic() - started < BUDGET_SECONDS:
            # What ran before leaves the caches as it likes them.
            random.shuffle(turns)
            for name, run in turns:
                times[name].append(seconds(run, device, repeats=1))
    least = {name: min(measured) for name, measured in times.items()}
    result = Result(layer, {name: least[name] for name in plans}, least["again"])
    for policy, objective in policies.items():
        decision = decide(problem, objective)
        plan = decision.plan if decision.changed else None
        result.chosen[policy] = next(name for name, other in plans.items() if same(plan, other))
    return result


def incoming_graph(layer: Layer, device: torch.device) -> fx.GraphModule:
    """The traced graph of a layer as it came: joint, or of the forward alone."""
    torch._dynamo.reset()
    seen: list[fx.GraphModule] = []
    model = Lora(layer).to(device)
    x = torch.randn(layer.tokens, layer.inputs, device=device, dtype=getattr(torch, layer.dtype))
    keep = aot_backend(Options(margin=0.999), seen.append)
    with torch.set_grad_enabled(layer.backward):
        torch.compile(model, backend=keep, fullgraph=True, dynamic=False)(
            x.requires_grad_(layer.backward)
        )
    return seen[0]


def objectives(problem: Problem, device: torch.device) -> dict[str, Objective]:
    """The policies to compare."""
    dtype = problem.dtype
    stored = Machine(use_stored=True)
    exact = Pricing(Options(tune="shapes"), stored, device)
    calibrated = Objective("time", profile=stored.profile(device, dtype))
    exact.measure([problem])
    return {
        "flops": Objective("flops"),
        "off": Objective("time", profile=Machine(use_stored=False).profile(device, dtype)),
        "profile": calibrated,
        "shapes": exact.objective(dtype),
    }


def candidates(problem: Problem, policies: list[Objective]) -> dict[str, Plan | None]:
    """All plans to time, by name: for each policy and each first step of each demand the best."""
    plans: list[Plan] = []
    for objective in policies:
        plans.append(search(problem, objective).plan)
        for demand in problem.demands:
            ways = Ways(problem, objective).of(demand)
            turned = Problem(
                **{
                    **problem.__dict__,
                    "demands": (demand, *(d for d in problem.demands if d != demand)),
                }
            )
            plans += [search(turned, objective, step).plan for step, *_ in ways]
    unique: dict[frozenset[Any], Plan] = {frozenset(p.steps.items()): p for p in plans}
    chosen = [decide(problem, objective).plan for objective in policies]
    kept = [
        plan
        for plan in unique.values()
        if any(same(plan, own) for own in chosen)
        or not any(dominates(problem, other, plan) for other in unique.values())
    ]
    return {AS_IT_CAME: None, **{f"plan {i}": plan for i, plan in enumerate(kept)}}


def dominates(problem: Problem, one: Plan, other: Plan) -> bool:
    """Whether a plan needs less of something and more of nothing."""
    a, b = one.cost(problem), other.cost(problem)
    mine, theirs = (a.flops, a.bytes, a.kernels), (b.flops, b.bytes, b.kernels)
    return mine != theirs and all(x <= y for x, y in zip(mine, theirs, strict=True))


def same(one: Plan | None, other: Plan | None) -> bool:
    """Whether two plans are one."""
    if one is None or other is None:
        return one is other
    return dict(one.steps) == dict(other.steps)


def runnable(gm: fx.GraphModule, plan: Plan | None, backward: bool) -> Callable[[], object]:
    """A call that runs a layer by a plan, forward and backward, on random data."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    module = fx.GraphModule({}, graph)
    if plan is not None:
        apply(Analysis(graph, ATEN), {0: plan})
        module.recompile()
    known: dict[str, Any] = {
        node.name: random_like(node.meta["val"]) for node in graph.nodes if node.op == "placeholder"
    }
    parts = [module]
    if backward:
        output = next(node for node in graph.nodes if node.op == "output")
        output.args = (tuple(x for x in torch.utils._pytree.tree_leaves(output.args[0])),)
        parts = list(partitioned(module, list(known.values()), 1))
    calls = []
    for part in parts:
        given = [known[node.name] for node in part.graph.nodes if node.op == "placeholder"]
        (output,) = (node for node in part.graph.nodes if node.op == "output")
        with torch.no_grad():
            results = part(*given)
        known |= {
            node.name: value
            for node, value in zip(output.args[0], results, strict=True)
            if isinstance(node, fx.Node)
        }
        calls.append((part.forward, given))

    def run() -> None:
        for call, given in calls:
            call(*given)

    return run


def random_like(val: Tensor) -> Tensor:
    """Random numbers of a tensor's shape; never zeros, which some kernels skip."""
    return torch.randn(val.shape, device=val.device).to(val.dtype) / 8


def summary(results: list[Result], machine: str) -> str:
    """The table of regrets."""
    lines = [
        f"{len(results)} layers on {machine}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads. Two measurements of one graph differ by "
        f"{median(r.noise for r in results):.1%} in the median, "
        f"{quantile([r.noise for r in results], 0.95):.1%} in the 95th percentile.",
        "",
        "| policy | regret, median | 95th pct. | worst | slower than it came, 95th pct. | worst |",
        "|---|---|---|---|---|---|",
    ]
    never = [r.times[AS_IT_CAME] / min(r.times.values()) - 1 for r in results]
    rows = {
        p: ([r.regret(p) for r in results], [r.slower(p) for r in results])
        for p in results[0].chosen
    }
    rows["never change anything"] = (never, [0.0] * len(results))
    for policy, (regret, slower) in rows.items():
        lines.append(
            f"| {policy} | {median(regret):.1%} | {quantile(regret, 0.95):.1%} | {max(regret):.1%} "
            f"| {quantile(slower, 0.95):.1%} | {max(slower):.1%} |"
        )
    return "\n".join(lines) + "\n"


def quantile(values: list[float], share: float) -> float:
    """The value below which a share of the values lies."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


if __name__ == "__main__":
    main()
