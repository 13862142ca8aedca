"""The command: workers run the operators, and the figures are printed."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

import tests.opinfo
from tests.opinfo.samples import PLAIN, infos, run_op

#: What ``--backend runlora`` runs without ``--op``: linear algebra and what stands beside it.
LINEAR = (
    "mm", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "mv", "matmul", "__rmatmul__", "einsum",
    "tensordot", "inner", "dot", "outer", "kron", "nn.functional.linear", "nn.functional.bilinear",
    "linalg.multi_dot", "linalg.vecdot", "linalg.matrix_power", "nn.functional.embedding",
    "nn.functional.dropout", "nn.functional.scaled_dot_product_attention",
)  # fmt: skip


def work(backend: str, most: int) -> None:
    """A worker: names of operators on standard input, outcomes as lines of JSON."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    known = infos()
    # What torch prints does not belong among the outcomes.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            for found in run_op(known[line.strip()], backend, most):
                print(json.dumps(found), file=out, flush=True)
        except Exception as error:  # of the samples themselves
            text = f"{type(error).__name__}: {error}"[:300]
            outcome = {"op": line.strip(), "outcome": "eager raises", "text": text}
            print(json.dumps(outcome), file=out, flush=True)
        print("done", file=out, flush=True)


#: The outcomes that are counted, and not printed.
QUIET = ("right", "eager raises", "not deterministic")


class Worker:
    """A process that runs operators, and the lines that it prints."""

    def __init__(self, backend: str, most: int) -> None:
        command = [sys.executable, "-m", "tests.opinfo", "--worker", "--backend", backend]
        self.process = subprocess.Popen(
            [*command, "--samples", str(most)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.warm = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def outcomes(self, op: str, seconds: float) -> Iterator[dict[str, Any]]:
        """The outcomes of an operator; the last one says so if the process did not end it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(op, file=self.process.stdin, flush=True)
        # The first operator waits for the imports.
        limit = seconds if self.warm else seconds + 120
        timer = threading.Timer(limit, self.process.kill)
        timer.start()
        try:
            while (line := self.lines.get()) not in ("", "done\n"):
                self.warm = True
                yield json.loads(line)
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if line == "":
            status = self.process.wait()
            yield {
                "op": op,
                "outcome": "out of time" if late else "crash",
                "text": f"exit status {status}",
            }


def main() -> int:
    """Run the operators; 1 if a failure is ours."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.opinfo", description=tests.opinfo.__doc__
    )
    parser.add_argument("--op", action="append", help="a name, such as nn.functional.linear")
    parser.add_argument("--backend", choices=tuple(PLAIN), default="runlora_eager")
    parser.add_argument("--samples", type=int, default=2, help="of an operator and dtype")
    parser.add_argument("--seconds", type=float, default=20, help="that an operator may take")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th operator, from the I-th")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(asked.backend, asked.samples)
        return 0
    known = infos()
    wanted = asked.op or (LINEAR if asked.backend == "runlora" else None)
    names = [n for n, i in known.items() if not wanted or n in wanted or i.name in wanted]
    missing = set(wanted or ()) - {i.name for i in known.values()} - set(known)
    if missing:
        parser.error(f"no such operator: {', '.join(sorted(missing))}")
    first, shards = map(int, asked.shard.split("/"))
    return show(names[first::shards], asked.backend, asked.samples, asked.seconds)


def show(names: list[str], backend: str, most: int, seconds: float) -> int:
    """Run the operators in workers and print the figures; 1 if a failure is ours."""
    counts: Counter[str] = Counter()
    ops: defaultdict[str, set[str]] = defaultdict(set)
    changed = 0
    worker = Worker(backend, most)
    for op in names:
        if worker.process.poll() is not None:
            worker = Worker(backend, most)
        for found in worker.outcomes(op, seconds):
            counts[found["outcome"]] += 1
            ops[found["outcome"]].add(op)
            changed += found.get("changed", False)
            if found["outcome"] not in QUIET:
                where = f"{op} {found.get('dtype', '')} {found.get('sample', '')}"
                print(f"{found['outcome']}: {where}: {found['text']}", flush=True)
    worker.process.kill()
    total = sum(counts.values())
    print(f"{len(names)} operators, {total} samples, {changed} with a rewritten region")
    for outcome, count in counts.most_common():
        print(f"  {count} {outcome}, of {len(ops[outcome])} operators")
    return int(bool(counts["ours"] or counts["crash"]))


if __name__ == "__main__":
    sys.exit(main())
