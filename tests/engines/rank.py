"""One rank: ``python -m tests.engines.rank ENGINE FOLDER``, with the environment of a group.

It trains under Inductor and under ours, and writes what it saw into ``FOLDER/rank-N.json``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

RANK = int(os.environ["RANK"])
FOLDER = Path(sys.argv[2])
# Ranks measure, and store, for themselves, as on several machines.
os.environ["RUNLORA_CACHE_DIR"] = str(FOLDER / f"profiles-{RANK}")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices.machine import key_of
from runlora_fx.cost_model.store import Record
from runlora_fx.history import collecting
from tests.engines.cases import ENGINES, Prepared
from tests.engines.model import STEPS, adapted, batch, share, train

#: Times of one FLOP and of one byte [s]. By the first it pays to merge, by the second it does not.
PROFILES = ((1e-12, 1e-25), (1e-25, 1e-12))


def store_profile(rank: int) -> None:
    """Store a profile that no other rank has, nor agrees with."""
    flop, byte = PROFILES[rank % len(PROFILES)]
    rates = {
        **dict.fromkeys(("flops.nn", "flops.nt", "flops.tn"), flop),
        **dict.fromkeys(("read", "written", "elementwise"), byte),
        **dict.fromkeys(("launches", "special", "random"), 1e-25),
    }
    store.add(key_of(torch.device("cpu"), "float32"), Record(rates))


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
    """Bytes that the forward keeps for its backward on this rank, parameters aside [B].

    Storages count once and in full. Those that FSDP has freed after the forward have no bytes.
    """
    given = share(batch(STEPS), prepared.part, prepared.parts)
    known = {
        _plain(x).untyped_storage().data_ptr()
        for x in (*model.parameters(), *model.buffers(), *given.values())
    }
    saved: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        saved[_plain(x).untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        outputs = prepared.run(**given)
    held = sum(_plain(x).untyped_storage().nbytes() for at, x in saved.items() if at not in known)
    del outputs
    return held


def _plain(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def trained(engine: str, backend: str) -> dict[str, Any]:
    """Train under one backend."""
    torch._dynamo.reset()
    counters.clear()
    options = {"runlora.strict": True} if backend == "runlora" else None
    model = adapted()
    prepared = ENGINES[engine].prepare(model, {"backend": backend, "options": options})
    with collecting() as reports:
        losses = train(prepared.run, model, prepared.part, prepared.parts)
    keys = "" if backend == "inductor" else str(FOLDER / "trained.pt")
    options_of_state = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if keys:
        whole = prepared.run if isinstance(prepared.run, nn.Module) else model
        state = get_model_state_dict(whole, options=options_of_state)
        if dist.get_rank() == 0:
            torch.save(state, keys)
    seen = {
        "losses": losses,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "sites": sites_of(reports),
        "from_cache": [report.from_cache for report in reports],
        "refusals": sorted({r.reason for report in reports for r in report.refusals}),
        "fewer": sum(report.recomputation.fewer_bytes for report in reports),
        "kept": kept(prepared, model),
    }
    del prepared, model
    gc.collect()
    return seen


def main() -> None:
    """Run the engine."""
    torch.set_num_threads(1)
    os.environ.pop("CI", None)
    store_profile(RANK)
    os.environ["CI"] = "true"
    engine = sys.argv[1]
    if ENGINES[engine].how == "plain":
        world = int(os.environ["WORLD_SIZE"])
        method = f"file://{FOLDER}/group"
        dist.init_process_group("gloo", init_method=method, rank=RANK, world_size=world)
    found = {backend: trained(engine, backend) for backend in ("inductor", "runlora")}
    (FOLDER / f"rank-{RANK}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
