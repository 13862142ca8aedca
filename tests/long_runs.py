"""Long runs: what grows while a process trains, and while it compiles.

    python -m tests.long_runs training --steps 1000 --dtype bfloat16
    python -m tests.long_runs compiles --count 10000

``training`` changes the length of every batch, swaps adapters, and evaluates between. ``compiles``
rewrites graphs of ever other sizes. Both print what memory, recompiles and all tables of the
package hold after the warm-up and at the end.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import runlora_fx

#: What `functools.cache` and `lru_cache` make.
_Cache = type(cache(lambda: None))

WIDTH, RANK, LENGTHS = 24, 2, (16, 24, 40, 56)


def resident() -> int:
    """The resident memory of this process [B]."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def tables() -> dict[str, int]:
    """By name, the number of entries of every container and cache at the top of our modules."""
    return dict(_tables())


def _tables() -> Iterator[tuple[str, int]]:
    for name, module in sorted(sys.modules.items()):
        if name.split(".")[0] != "runlora_fx":
            continue
        for attribute, value in sorted(vars(module).items()):
            where = f"{name}.{attribute}"
            if isinstance(value, type) and value.__module__ == name:
                for inner, held in sorted(vars(value).items()):
                    yield from _sizes(f"{where}.{inner}", held)
            else:
                yield from _sizes(where, value)


def _sizes(name: str, value: Any) -> Iterator[tuple[str, int]]:
    if isinstance(value, _Cache):
        yield name, value.cache_info().currsize
    elif isinstance(value, dict | list | set) and not name.endswith("__"):
        yield name, len(value)


def bound_of(name: str) -> int | None:
    """The most entries that a cache takes; None if there is no bound."""
    *path, attribute = name.split(".")
    for cut in range(len(path), 0, -1):
        module = sys.modules.get(".".join(path[:cut]))
        if module is not None:
            found: Any = module
            for part in (*path[cut:], attribute):
                found = getattr(found, part)
            return found.cache_info().maxsize if isinstance(found, _Cache) else None
    return None


class Adapted(nn.Module):
    """Two linear layers with two sets of adapters, of which one is active."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)).requires_grad_(False)
        self.a = nn.ParameterDict({n: torch.randn(2, RANK, WIDTH) / 5 for n in ("one", "other")})
        self.b = nn.ParameterDict({n: torch.zeros(2, WIDTH, RANK) for n in ("one", "other")})
        self.active = "one"

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a[self.active], self.b[self.active]
        for i, base in enumerate(self.base):
            x = x + F.gelu(base(x) + 2.0 * F.linear(F.linear(x, a[i]), b[i]))
        return x


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The batch of a step: another length than the last one."""
    generator = torch.Generator().manual_seed(step)
    shape = (2, LENGTHS[step % len(LENGTHS)], WIDTH)
    x = torch.randn(shape, generator=generator)
    return x.to(dtype), torch.tanh(x.roll(1, -1)).to(dtype)


def train(backend: str | None, steps: int, dtype: torch.dtype, report: int = 0) -> dict[str, Any]:
    """Train, swap the adapters every 50 steps, evaluate every 20.

    Returns:
        Losses, and at the warm-up and the end: memory, compiled graphs, tables.
    """
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = Adapted().to(dtype)
    run: Any = model if backend is None else torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    losses, seen = [], []
    warm = max(steps // 4, 1)
    for step in range(steps):
        model.active = ("one", "other")[step // 50 % 2]
        x, target = batch(step, dtype)
        loss = (run(x) - target).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0:
            model.eval()
            with torch.no_grad():
                losses.append((run(x) - target).float().square().mean().item())
            model.train()
        if step + 1 in (warm, steps):
            gc.collect()
            seen.append((resident(), counters["stats"]["unique_graphs"], tables()))
        if report and step % report == 0:
            print(f"step {step}: loss {losses[-1]:.5f}, {resident() >> 20} MiB", flush=True)
    return {"losses": losses, "warm": seen[0], "end": seen[-1]}


def graph_of(i: int) -> tuple[fx.GraphModule, list[Tensor]]:
    """A LoRA layer of sizes that no smaller number has, as a graph with its inputs."""
    tokens, width = 16 + i % 97, 8 + i // 97 % 61

    def layer(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x @ w.t() + 2.0 * (x @ a.t() @ b.t())

    sizes = ((tokens, width), (width, width), (RANK, width), (width, RANK))
    return fx.symbolic_trace(layer), [torch.empty(size) for size in sizes]


def compile_many(count: int, report: int = 0) -> dict[str, Any]:
    """Rewrite many graphs of other sizes; memory and tables at the warm-up and at the end."""
    seen = []
    for i in range(count):
        graph, inputs = graph_of(i)
        runlora_fx.rewrite(graph, inputs, objective="flops")
        if i + 1 in (max(count // 2, 1), count):
            gc.collect()
            seen.append((resident(), i + 1, tables()))
        if report and i % report == 0:
            print(f"graph {i}: {resident() >> 20} MiB", flush=True)
    return {"warm": seen[0], "end": seen[-1]}


def grown(warm: dict[str, int], end: dict[str, int]) -> dict[str, tuple[int, int, int | None]]:
    """The tables that have grown: entries before and after, and the most that they take."""
    return {
        name: (warm.get(name, 0), size, bound_of(name))
        for name, size in end.items()
        if size > warm.get(name, 0)
    }


def _show(run: dict[str, Any], what: str) -> None:
    (before, graphs, few), (after, more, many) = run["warm"], run["end"]
    print(f"memory after the warm-up {before / 2**20:.1f} MiB, at the end {after / 2**20:.1f} MiB")
    print(f"{what} {graphs} and {more}; {len(many)} tables, {sum(many.values())} entries")
    for name, (was, now, most) in grown(few, many).items():
        print(f"  {name}: {was} -> {now} (at most {most})")


def main() -> None:
    """Run what is asked for, and print what has grown."""
    parser = argparse.ArgumentParser(prog="python -m tests.long_runs", description=__doc__)
    parser.add_argument("what", choices=("training", "compiles"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--backend", default="runlora")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what == "compiles":
        _show(compile_many(asked.count, asked.count // 10), "graphs rewritten")
        return
    dtype = getattr(torch, asked.dtype)
    ours = train(asked.backend, asked.steps, dtype, asked.steps // 10)
    _show(ours, "graphs compiled")
    eager = train(None, asked.steps, dtype)["losses"]
    exact = train(None, asked.steps, torch.float64)["losses"]
    for name, losses in (("ours", ours["losses"]), ("eager", eager)):
        apart = max(abs(one - two) for one, two in zip(losses, exact, strict=True))
        print(f"largest distance of a loss from fp64, {name}: {apart:.3g}")


if __name__ == "__main__":
    main()
