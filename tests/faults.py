"""Faults: an exception in one function of the package, wherever a room calls another one.

    boundaries(run)                  the functions that a run calls across rooms
    with raising(code): run()        the first call of one of them raises

``python -m tests.faults`` makes each of them fail on graphs that use all rooms, and counts.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import runlora_fx
from runlora_fx import joint_pass
from runlora_fx.aot import copied
from runlora_fx.passes.levels.aten import ATEN
from tests.mutations.graphs import GRAPHS, Came
from tests.mutations.run import are_same, quietly, values_of

_ROOT = str(Path(runlora_fx.__file__).parent)

#: The graphs that use all rooms.
NAMES = ("two kinds of layers", "DoRA", "experts", "stacks", "recompute")


#: Outcomes that are right.
FINE = ("one warning", "as without it")


class InjectedError(RuntimeError):
    """What a function raises that is made to fail."""


def _room(code: CodeType) -> str | None:
    """The folder of a function of the package; that of a module at the top is its own."""
    if not code.co_filename.startswith(_ROOT):
        return None
    path = Path(code.co_filename).relative_to(_ROOT)
    return str(path if len(path.parts) == 1 else path.parent)


def boundaries(run: Callable[[], object]) -> list[CodeType]:
    """The functions that are called from another room, in the order of their first calls."""
    found: dict[CodeType, None] = {}
    rooms: dict[CodeType, str | None] = {}

    def see(frame: FrameType, event: str, _: Any) -> None:
        caller = frame.f_back
        if event != "call" or caller is None:
            return
        for code in (frame.f_code, caller.f_code):
            if code not in rooms:
                rooms[code] = _room(code)
        here, there = rooms[frame.f_code], rooms[caller.f_code]
        if here is not None and there is not None and here != there:
            found.setdefault(frame.f_code)

    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
    return list(found)


@contextmanager
def raising(code: CodeType, at: int = 0) -> Iterator[list[int]]:
    """A context in which one call of a function raises an :class:`InjectedError`.

    Args:
        code: Of the function.
        at: Which call.

    Yields:
        The number of calls so far, as the only entry.
    """
    calls = [0]

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is code:
            calls[0] += 1
            if calls[0] - 1 == at:
                raise InjectedError("out of luck")

    sys.setprofile(see)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def run_pass(came: Came) -> Any:
    """The pass on a copy of a joint graph, as the backend calls it."""
    module = copied(came.module)
    joint_pass.run(
        module.graph, ATEN, came.options, came.machine, may_guard=True, joins_in_place=came.joins
    )
    return module


def outcome(came: Came, wanted: list[Any], code: CodeType, at: int = 0, *, most: int) -> str:
    """What comes of one fault.

    Args:
        came: The graph.
        wanted: What it computes.
        code: The function that fails.
        at: In which call.
        most: How many sites are changed without a fault.

    Returns:
        ``"one warning"``; ``"as without it"`` if a retry or a default took its place and all sites
        are changed; or else what went wrong.
    """
    with quietly() as said:
        try:
            with raising(code, at):
                module = run_pass(came)
        except Exception as error:
            return f"raised {type(error).__name__}"
    module.graph.lint()
    if not are_same(values_of(came, module), wanted):
        return "WRONG NUMBERS"
    if len(said) == 1:
        return "one warning"
    if not said and sites_changed() == most:
        return "as without it"
    return f"{len(said)} warnings, {sites_changed()} of {most} sites changed: {said}"


def sites_changed() -> int:
    """How many sites the last run has changed."""
    report = runlora_fx.last_report()
    return 0 if report is None else sum(site.changed for site in report.sites)


def name_of(code: CodeType) -> str:
    """The name of a function, with its room."""
    return f"{_room(code)}: {code.co_qualname if hasattr(code, 'co_qualname') else code.co_name}"


def main() -> int:
    """Make every function fail on every graph; 1 if a fault did harm."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    every: set[CodeType] = set()
    for graph in sys.argv[1:] or NAMES:
        came = GRAPHS[graph]()
        run_pass(came)
        most = sites_changed()
        wanted, codes = values_of(came, came.module), boundaries(lambda came=came: run_pass(came))  # type: ignore[misc]
        every |= set(codes)
        for code in codes:
            found = outcome(came, wanted, code, most=most)
            counts[found if found in FINE else "other"] += 1
            if found not in FINE:
                print(f"{graph}: {name_of(code)}: {found}", flush=True)
    print(f"{len(every)} functions, {sum(counts.values())} faults: {dict(counts)}")
    return int("other" in counts)


if __name__ == "__main__":
    sys.exit(main())
