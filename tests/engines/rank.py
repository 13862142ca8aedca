"""One rank: ``python -m tests.engines.rank ENGINE FOLDER``, with the environment of a group.

It trains under Inductor and under ours, and writes what it saw into ``FOLDER/rank-N.json``.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from runlora_fx.cost_model import store
from runlora_fx.history import collecting
from tests.engines.cases import ENGINES, Prepared
from tests.engines.kept import Kept
from tests.engines.model import STEPS, adapted, batch, plain_step, share, train
from tests.engines.profiles import store_profile

RANK = int(os.environ["RANK"])
FOLDER = Path(sys.argv[2])


def sites_of(reports: list[Any]) -> list[dict[str, Any]]:
    """What was decided, in order, as data that ranks can compare."""
    return [
        {
            "modules": site.modules,
            "shapes": site.shapes,
            "after": site.after,
            "changed": site.changed,
            "saved": site.saved,
            "flops": (site.flops_before, site.flops_after),
        }
        for report in reports
        for site in report.sites
    ]


def kept(prepared: Prepared, model: nn.Module) -> int:
    """Bytes that the forward keeps for its backward on this rank, parameters aside [B]."""
    given = share(batch(STEPS), prepared.part, prepared.parts)
    keep = Kept((*model.parameters(), *model.buffers(), *given.values()))
    with saved_tensors_hooks(keep, lambda x: x):
        outputs = prepared.run(**given)
    held = keep.bytes
    del outputs
    return held


def saved_state(prepared: Prepared, model: nn.Module) -> dict[str, Tensor]:
    """The state as torch gathers it for a checkpoint, on the first rank; a stage's on each."""
    if prepared.owned:
        state = model.state_dict()
        return {k: v for k, v in state.items() if any(part in k for part in prepared.owned)}
    whole = prepared.run if isinstance(prepared.run, nn.Module) else model
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(whole, options=options)


def trained(name: str, backend: str) -> dict[str, Any]:
    """Train under one backend."""
    torch._dynamo.reset()
    counters.clear()
    options = {"runlora.strict": True} if backend == "runlora" else None
    model = adapted()
    prepared = ENGINES[name].prepare(model, {"backend": backend, "options": options})
    step = prepared.step or plain_step(prepared.run, prepared.part, prepared.parts)
    first, then = resumed(model) if ENGINES[name].how == "torchrun" else (0, lambda i: None)
    with collecting() as reports:
        losses = train(step, model, first, then)
    state = saved_state(prepared, model)
    if backend == "runlora" and state:
        torch.save(state, FOLDER / f"trained-{RANK}.pt")
    seen = {
        "losses": losses,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "sites": sites_of(reports),
        "caches": {
            name: counters["aot_autograd" if "autograd" in name else "inductor"][name]
            for name in ("autograd_cache_hit", "fxgraph_cache_hit", "fxgraph_cache_miss")
        },
        "from_cache": [report.from_cache for report in reports],
        "refusals": sorted({r.reason for report in reports for r in report.refusals}),
        "kept": 0 if prepared.step else kept(prepared, model),
        "attempt": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    }
    del prepared, model
    gc.collect()
    return seen


def resumed(model: nn.Module) -> tuple[int, Callable[[int], None]]:
    """Load what the last attempt has left, if it has left something.

    Returns:
        The first step to train. What to do after each: save, and in the first attempt die.
    """
    path, first = FOLDER / "checkpoint.pt", 0
    if path.exists():
        kept = torch.load(path)
        model.load_state_dict(kept["state"])
        first = kept["step"] + 1

    def then(step: int) -> None:
        dist.barrier()
        if RANK == 0 and step == 0:
            torch.save({"state": model.state_dict(), "step": step}, path)
        dist.barrier()
        if RANK == 1 and not first and step == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return first, then


def main() -> None:
    """Run the engine."""
    torch.set_num_threads(1)
    # Ranks measure, and store, for themselves, as on several machines.
    os.environ[store.FOLDER_VARIABLE] = str(FOLDER / f"profiles-{RANK}")
    store_profile(RANK)
    name = sys.argv[1]
    engine = ENGINES[name]
    if engine.how == "plain":
        world = int(os.environ["WORLD_SIZE"])
        method = f"file://{FOLDER}/group"
        dist.init_process_group("gloo", init_method=method, rank=RANK, world_size=world)
    elif engine.how == "torchrun":
        dist.init_process_group("gloo")
    backends = ("runlora",) if engine.how == "torchrun" else ("inductor", "runlora")
    found = {backend: trained(name, backend) for backend in backends}
    (FOLDER / f"rank-{RANK}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
