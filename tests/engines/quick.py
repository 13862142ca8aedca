"""DDP and FSDP2 in a few seconds: ``python -m tests.engines.quick RANK FOLDER``.

Two adapted layers without PEFT, compiled without code generation. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from runlora_fx.cost_model import store
from runlora_fx.history import collecting
from tests.engines.profiles import store_profile

RANKS, ROWS, TOKENS, WIDTH, STEPS = 2, 4, 24, 32, 2


class Adapted(nn.Module):
    """Two linear layers, each with an adapter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)).requires_grad_(False)
        self.a = nn.ModuleList(nn.Linear(WIDTH, 2, bias=False) for _ in range(2))
        self.b = nn.ModuleList(nn.Linear(2, WIDTH, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Activations (rows, tokens, width) -> the same."""
        for base, a, b in zip(self.base, self.a, self.b, strict=True):
            x = torch.tanh(base(x) + 2.0 * b(a(x)))
        return x


def losses(run: Any, model: nn.Module, rank: int, ranks: int) -> list[float]:
    """Train with SGD on the rows of one rank."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    found = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(ROWS, TOKENS, WIDTH, generator=generator).chunk(ranks)[rank]
        loss = (run(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def main() -> None:
    """Train alone and in eager mode, then with both engines."""
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    os.environ[store.FOLDER_VARIABLE] = f"{folder}/profiles-{rank}"
    store_profile(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    model = Adapted()
    found: dict[str, Any] = {"alone": losses(model, model, 0, 1)}
    for name in ("ddp", "fsdp2"):
        torch._dynamo.reset()
        model = Adapted()
        wrapped: Any = DistributedDataParallel(model) if name == "ddp" else fully_shard(model)
        run = torch.compile(wrapped, backend="runlora_eager", options={"runlora.strict": True})
        with collecting() as reports:
            seen = losses(run, model, rank, RANKS)
        sites = [(s.shapes, s.after, s.changed) for report in reports for s in report.sites]
        found[name] = {"losses": seen, "sites": sites}
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
