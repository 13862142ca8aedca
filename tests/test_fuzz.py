"""Some hundred random programs; ``python -m tests.fuzz`` runs as many as asked.

Every program is rewritten under ``strict`` at every level of graphs, by FLOPs and by time, and
compared with eager: values, gradients, what it mutates, strides.
"""

from typing import Any

import pytest
from torch import Tensor, fx

from tests.fuzz import levels
from tests.fuzz.case import Program
from tests.fuzz.generate import random_case
from tests.fuzz.levels import Level, has_promised_strides, traced
from tests.fuzz.run import outcome_of

#: Programs that fail, as (level, dynamic, seed): each is an open bug, and has to fail.
KNOWN: set[tuple[Level, bool, int]] = set()

STATIC: list[tuple[Level, int]] = [
    ("torch", 60),
    ("dynamo", 30),
    ("make_fx", 80),
    ("step", 20),
    ("export", 12),
    ("joint", 30),
    ("timed", 30),
]
DYNAMIC: list[tuple[Level, int]] = [("dynamo", 10), ("make_fx", 16), ("joint", 10), ("timed", 8)]

#: Where little is rewritten yet: `make_fx` spells linear layers on symbolic sizes by `expand`.
SELDOM_CHANGED: set[tuple[Level, bool]] = {("make_fx", True)}


def _check(level: Level, cases: int, *, dynamic: bool) -> None:
    failures, changed, run = [], 0, 0
    for seed in range(5000, 5000 + cases):
        outcome = outcome_of(random_case(seed), level, dynamic=dynamic)
        run += not outcome.skipped
        changed += outcome.changed
        if (outcome.failure is not None) != ((level, dynamic, seed) in KNOWN):
            cause = outcome.failure.cause if outcome.failure else "known to fail, but passes"
            failures.append(f"seed {seed}: {cause}")
    assert not failures, f"{len(failures)} of {cases}:\n" + "\n".join(failures)
    # What is not rewritten shows nothing.
    assert changed > cases / 6 or (level, dynamic) in SELDOM_CHANGED
    assert run > cases / 2


@pytest.mark.parametrize(("level", "cases"), STATIC)
def test_static(level: Level, cases: int) -> None:
    _check(level, cases, dynamic=False)


@pytest.mark.parametrize(("level", "cases"), DYNAMIC)
def test_dynamic(level: Level, cases: int) -> None:
    _check(level, cases, dynamic=True)


def test_strides_that_torch_promises_wrongly_are_not_compared() -> None:
    """On symbolic sizes the fake kernel of ``native_dropout_backward`` returns plain strides."""
    case = random_case(30064)
    program = Program(case)
    model, inputs = program.model(), program.inputs(case.sizes)
    for dynamic in (False, True):
        graph = traced("step", model, inputs, dynamic=dynamic)
        assert has_promised_strides(graph, model, inputs) != dynamic
        assert outcome_of(case, "step", dynamic=dynamic).failure is None


def test_strides_that_a_rewrite_changes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewritten graph returns transposed copies; torch's example values are right."""

    def turned(gm: fx.GraphModule, *_: Any) -> fx.GraphModule:
        for node in gm.graph.output_node().all_input_nodes:
            with gm.graph.inserting_before(gm.graph.output_node()):
                copy = gm.graph.call_function(_turned, (node,))
            node.replace_all_uses_with(copy, delete_user_cb=lambda user, c=copy: user is not c)  # type: ignore[misc]
        gm.recompile()
        return gm

    monkeypatch.setattr(levels, "_rewrite", turned)
    failure = outcome_of(random_case(30064), "step", excuses=False).failure
    assert failure is not None
    assert failure.kind == "strides"


def _turned(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else x
