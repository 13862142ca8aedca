"""Starts the processes of an engine, and compares what they saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.engines.cases import ENGINES, Engine
from tests.engines.model import adapted, alone, evaluated

ROOT = Path(__file__).parent.parent.parent

#: The longest that an engine may take [s].
LIMIT_S = 600

#: The relative distance of losses in float32 that counts as equal.
NEAR = 1e-5


@dataclass
class Outcome:
    """What the ranks of an engine saw.

    Attributes:
        engine: Its name.
        ranks: What each wrote, by backend.
        problems: What is not as it should be.
    """

    engine: str
    ranks: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ours(self) -> dict[str, Any]:
        """What the first rank saw under ours."""
        found: dict[str, Any] = self.ranks[0]["runlora"]
        return found


def _command(engine: Engine, folder: Path) -> list[str]:
    asked = ["tests.engines.rank", engine.name, str(folder)]
    port = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    if engine.how == "torchrun":
        run = ["torch.distributed.run", "--nproc-per-node", str(engine.ranks), *port]
        return [sys.executable, "-m", *run, "--max-restarts=1", "-m", *asked]
    # `accelerate launch --cpu` starts several processes through MPI only. With --multi_gpu it
    # starts them through torchrun, and the script asks for the CPU.
    run = ["--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    count = ["--num_processes", str(engine.ranks), "--main_process_port=0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *run, *count, "-m", *asked]


def run(name: str, folder: Path) -> Outcome:
    """Start an engine, wait for it, and compare its ranks with one process in eager mode."""
    engine, found = ENGINES[name], Outcome(name)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "CI": "true",
        # torch 2.13 else gives the store of the first start to the second one, where gloo finds
        # the addresses of processes that are gone.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    starts: list[tuple[list[str], dict[str, str]]] = []
    if engine.how == "plain":
        command = [sys.executable, "-m", "tests.engines.rank", name, str(folder)]
        for rank in range(engine.ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(engine.ranks)}
            starts.append((command, place))
    else:
        starts.append((_command(engine, folder), {}))
    processes = []
    for i, (command, place) in enumerate(starts):
        with (folder / f"log-{i}").open("w") as log:
            given = {**environment, **place}
            processes.append(subprocess.Popen(command, env=given, cwd=ROOT, stdout=log, stderr=log))
    try:
        codes = [process.wait(LIMIT_S) for process in processes]
    except subprocess.TimeoutExpired:
        found.problems.append(f"it has not ended after {LIMIT_S} s")
        return found
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        lines = [line for path in folder.glob("log-*") for line in path.read_text().splitlines()]
        errors = [line for line in lines if "Error" in line]
        found.problems.append(f"exit codes {codes}: {(errors or lines or [''])[-1][:300]}")
        return found
    files = [folder / f"rank-{rank}.json" for rank in range(engine.ranks)]
    found.ranks = [json.loads(path.read_text()) for path in files]
    found.problems += _problems(engine, found.ranks) + _checkpoint(folder)
    return found


@cache
def _alone() -> dict[str, Any]:
    return alone()


def _problems(engine: Engine, ranks: list[dict[str, Any]]) -> list[str]:
    problems = []
    ours = [rank["runlora"] for rank in ranks]
    wanted = _alone()["losses"][-len(ours[0]["losses"]) :]
    for backend in ranks[0]:
        each = [rank[backend]["losses"] for rank in ranks]
        for i, loss in enumerate(wanted):
            known = [losses[i] for losses in each if losses[i] is not None]
            apart = abs(sum(known) / len(known) - loss) / abs(loss)
            if not apart <= NEAR:
                problems.append(f"{backend}: loss {i} is {apart:.1e} from that of one process")
    if any(rank["graphs"] != ours[0]["graphs"] for rank in ours):
        problems.append("ranks have compiled different numbers of graphs")
    is_alike = not engine.name.startswith("pipeline")  # stages are different models
    if is_alike and any(rank["sites"] != ours[0]["sites"] for rank in ours):
        problems.append("ranks have planned differently")
    if not all(any(site["changed"] for site in rank["sites"]) for rank in ours):
        problems.append("a rank has rewritten nothing")
    for i, rank in enumerate(ranks):
        if "inductor" in rank and rank["runlora"]["kept"] > rank["inductor"]["kept"]:
            problems.append(f"rank {i} keeps more than under Inductor")
    if engine.how == "torchrun":
        if not all(rank["attempt"] == 1 for rank in ours):
            problems.append("no rank was started again")
        # Under DDP torch traces again, and takes the code of each graph from its cache.
        hits, misses = (
            [rank["caches"][f"fxgraph_cache_{which}"] for rank in ours] for which in ("hit", "miss")
        )
        if not all(hits) or any(misses):
            problems.append(f"the second start has compiled {misses} graphs again")
    return problems


def _checkpoint(folder: Path) -> list[str]:
    """Load what was saved into a new model, and compare its loss with that of one process."""
    state: dict[str, Any] = {}
    for path in sorted(folder.glob("trained-*.pt")):
        state |= torch.load(path)
    if any("_orig_mod" in name for name in state):
        return ["keys of the checkpoint have `_orig_mod`"]
    model = adapted()
    # FSDP and DDP keep the names of the model; a stage has those of its layers only.
    wrong = [name for name in state if name not in model.state_dict()]
    missing = [n for n in model.state_dict() if "lora_" in n and n not in state]
    if wrong or missing:
        return [f"the checkpoint has {wrong[:2]} and lacks {missing[:2]}"]
    model.load_state_dict(state, strict=False)
    wanted = _alone()["evaluated"]
    apart = abs(evaluated(model) - wanted) / wanted
    return [] if apart <= NEAR else [f"the loaded model's loss is {apart:.1e} from that of one"]
