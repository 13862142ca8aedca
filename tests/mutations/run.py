"""Making one mistake in one run of the pass, and judging what comes of it.

    outcomes(came, "lost scale", strict=False)   ->   {"caught": 12, "same": 3}

Every written node goes through one method, :meth:`Inserter.known`. The chosen call of it writes
something else. The reader sees what is written, not what was asked for, as with a bug.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from runlora_fx.aot import copied
from runlora_fx.passes.emit import apply as applying
from runlora_fx.passes.emit.nodes.inserter import Inserter
from runlora_fx.passes.emit.nodes.node_writer import NodeWriter
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.pipeline import rewrite_graph
from runlora_fx.passes.reproducer import Reproducer
from tests.mutations.graphs import Came
from tests.mutations.kinds import MISTAKES, Call, Mistake, Place

_KNOWN, _HAND_OVER, _MOVE_TO = Inserter.known, applying.hand_over, Inserter.move_to

#: Error that reassociation leaves in fp64, and in fp32 [relative].
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


class NotApplicable(BaseException):
    """Nothing can be made of the call that is to be replaced; not to be caught by the pass."""


@dataclass
class Made:
    """What a run with a mistake did.

    Attributes:
        places: How many calls were written.
        said: What was logged.
        error: What was raised.
        graph: The graph afterwards.
    """

    places: int = 0
    said: list[str] = field(default_factory=list)
    error: Exception | None = None
    graph: fx.GraphModule | None = None


class _Said(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())


@contextmanager
def quietly() -> Iterator[list[str]]:
    """A context in which warnings of ours go to a list, and no reproducer is written."""
    said: list[str] = []
    handler, log = _Said(said), logging.getLogger("runlora_fx")
    fakes = logging.getLogger("torch._subclasses.fake_tensor")  # of calls that do not fit
    was, level, log.propagate = log.propagate, fakes.level, False
    log.addHandler(handler)
    fakes.setLevel(logging.CRITICAL)
    try:
        with patch.object(Reproducer, "__call__", lambda *_: ""):
            yield said
    finally:
        log.removeHandler(handler)
        log.propagate = was
        fakes.setLevel(level)


def rewritten(came: Came, *patches: Any, strict: bool = False) -> Made:
    """Run the pass on a copy of a graph."""
    made, module = Made(), copied(came.module)
    try:
        with ExitStack() as stack:
            made.said = stack.enter_context(quietly())
            for one in patches:
                stack.enter_context(one)
            options = replace(came.options, strict=strict)
            rewrite_graph(module.graph, ATEN, options, came.machine, joins_in_place=came.joins)
    except Exception as error:
        made.error = error
    made.graph = module
    return made


# -- a mistake in a call -----------------------------------------------------------------------


class Saboteur:
    """Writes something else at one place.

    Attributes:
        places: How many calls were written.
        variants: How many mistakes there are at the chosen place.
    """

    def __init__(self, mistake: Mistake | None, place: int, variant: int) -> None:
        self._mistake, self._place, self._variant = mistake, place, variant
        self._writer: NodeWriter | None = None
        self.places = self.variants = 0

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """A context in which the mistake is made."""
        begin, saboteur = NodeWriter.__init__, self

        def known(insert: Inserter, *given: Any, **named: Any) -> fx.Node:
            return saboteur._known(insert, *given, **named)

        def start(writer: NodeWriter, *given: Any) -> None:
            begin(writer, *given)
            saboteur._writer = writer

        with patch.object(Inserter, "known", known), patch.object(NodeWriter, "__init__", start):
            yield

    def _known(
        self,
        insert: Inserter,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        value: Any,
        name: str | None = None,
    ) -> fx.Node:
        self.places += 1
        if self._mistake is None or self.places - 1 != self._place:
            return _KNOWN(insert, target, args, kwargs, value, name)
        nodes = list(insert._graph.nodes)
        before = nodes[: nodes.index(insert.anchor)]
        own = set(insert.written)
        came = [node for node in before if node not in own]
        place = Place(value, came, [node for node in before if node in own], insert.rule)
        others = list(self._mistake(Call(target, args, kwargs), place))
        self.variants = len(others)
        if self._variant >= len(others):
            raise NotApplicable
        made = self._write(insert, others[self._variant])
        if made.meta["val"].shape != value.shape:
            raise NotApplicable  # caught by any check
        return made

    def _write(self, insert: Inserter, call: Call) -> fx.Node:
        """Write a call, and first the calls that it reads; the reader knows them all."""

        def written(arg: Any) -> Any:
            if isinstance(arg, Call):
                return self._write(insert, arg)
            return [*map(written, arg)] if isinstance(arg, list | tuple) else arg

        args = tuple(map(written, call.args))
        try:
            value = insert._results(call.target, args, call.kwargs)
        except Exception as error:
            raise NotApplicable from error
        node = _KNOWN(insert, call.target, args, call.kwargs, value)
        writer = self._writer
        if writer is not None and writer._insert is insert:
            writer.rules[node] = writer._rule
            writer._reader.classify(node)
            writer._placed(node)
        return node


# -- mistakes outside of calls -----------------------------------------------------------------


class NewRoots:
    """Hands the uses of one root to what was written for another of the same shape."""

    def __init__(self, place: int) -> None:
        self._place = place
        self._pairs: list[tuple[fx.Node, fx.Node]] = []
        self.places = 0

    @contextmanager
    def at_work(self) -> Iterator[None]:
        saboteur = self

        def hand_over(old: fx.Node, new: fx.Node) -> None:
            saboteur.places += 1
            saboteur._pairs.append((old, new))
            if saboteur.places - 1 == saboteur._place:
                val, order = old.meta["val"], {n: i for i, n in enumerate(old.graph.nodes)}
                others = [
                    node
                    for node in old.graph.nodes
                    if node.meta.get("runlora") and node is not new and order[node] < order[old]
                    if node.meta["val"].shape == val.shape and node.meta["val"].dtype == val.dtype
                ]
                if not others:
                    raise NotApplicable
                new = others[-1]
            _HAND_OVER(old, new)

        with patch.object(applying, "hand_over", hand_over):
            yield


class BehindWrites:
    """Writes what is asked for in front of a node behind the anchor, past a write to memory."""

    def __init__(self, place: int) -> None:
        self._place = place
        self.places = 0

    @contextmanager
    def at_work(self) -> Iterator[None]:
        saboteur = self

        def move_to(insert: Inserter, anchor: fx.Node) -> None:
            saboteur.places += 1
            if saboteur.places - 1 == saboteur._place:
                node, passed = anchor.next, False
                while node.op != "output" and node not in anchor.users:
                    target = node.target
                    passed |= isinstance(target, torch._ops.OpOverload) and (
                        target._schema.is_mutable
                    )
                    node = node.next
                if not passed:
                    raise NotApplicable
                _MOVE_TO(insert, anchor)
                insert._anchor = node
                return
            _MOVE_TO(insert, anchor)

        with patch.object(Inserter, "move_to", move_to):
            yield


#: Mistakes that are no other call.
OTHERS: dict[str, Callable[[int], Any]] = {
    "root of another value": NewRoots,
    "moved past a write": BehindWrites,
}


#: The names of all mistakes.
ALL = (*MISTAKES, *OTHERS)

# -- judging -----------------------------------------------------------------------------------


def values_of(came: Came, module: fx.GraphModule) -> list[Any]:
    """What a graph returns, on fixed random numbers, and what it has written to its inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for node in came.module.graph.find_nodes(op="placeholder"):
        val = node.meta["val"]
        if val.dtype.is_floating_point:
            made = torch.randn(val.shape, generator=generator, dtype=val.dtype)
        else:
            made = torch.randint(0, 2, val.shape, generator=generator).to(val.dtype)
        inputs.append(made)
    torch.manual_seed(0)
    with torch.no_grad():
        interpreter = fx.Interpreter(module, garbage_collect_values=False)
        results = interpreter.run(*inputs, enable_io_processing=False)
    return [*tree_leaves(results), *inputs]


def are_same(found: list[Any], wanted: list[Any]) -> bool:
    """True if two graphs return the same: numbers, dtypes and strides."""
    return len(found) == len(wanted) and all(
        _is_same(mine, other) for mine, other in zip(found, wanted, strict=True)
    )


def _is_same(found: Any, wanted: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return bool(found == wanted)
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return False
    if found.stride() != wanted.stride():
        return False
    scale = float(wanted.double().abs().max().clamp(min=1.0))
    error = float((found.double() - wanted.double()).abs().max())
    return error <= _TOLERANCE.get(found.dtype, 1e-4) * scale


def outcome(came: Came, wanted: list[Any], worker: Any, *, strict: bool) -> str:
    """What comes of one mistake: caught, same, or what went wrong; empty if there is none."""
    try:
        made = rewritten(came, worker.at_work(), strict=strict)
    except NotApplicable:
        return ""
    if strict and made.error is not None:
        return "caught"
    if made.error is not None:
        return f"raised without strict: {made.error!r:.60}"
    assert made.graph is not None
    try:
        made.graph.graph.lint()
        found = values_of(came, made.graph)
    except Exception as error:
        return f"broken graph: {type(error).__name__}"
    if not are_same(found, wanted):
        return "warned, but wrong" if made.said else "WRONG NUMBERS"
    return {0: "same", 1: "caught"}.get(len(made.said), f"{len(made.said)} warnings")


def places_of(came: Came, mistake: str) -> int:
    """At how many places a mistake could be made."""
    worker = OTHERS[mistake](-1) if mistake in OTHERS else Saboteur(None, -1, 0)
    made = rewritten(came, worker.at_work(), strict=True)
    assert made.error is None, made.error
    return int(worker.places)


def outcomes(
    came: Came,
    mistake: str,
    *,
    strict: bool = False,
    every: int = 1,
    see: Callable[[str, int, int], None] = lambda *_: None,
) -> Counter[str]:
    """Make a mistake at every place of a graph, in every variant, and count what comes of it.

    Args:
        came: The graph.
        mistake: Its name.
        strict: The option of the pass.
        every: Only every such place; mistakes that are no calls are made everywhere.
        see: Called with every outcome, place and variant.
    """
    wanted, counts = values_of(came, came.module), Counter[str]()
    step = 1 if mistake in OTHERS else every
    for place in range(0, places_of(came, mistake), step):
        variant, variants = 0, 1
        while variant < variants:
            worker: Any
            if mistake in OTHERS:
                worker = OTHERS[mistake](place)
            else:
                worker = Saboteur(MISTAKES[mistake], place, variant)
            found = outcome(came, wanted, worker, strict=strict)
            variants = getattr(worker, "variants", 1)
            if found:
                counts[found] += 1
                see(found, place, variant)
            variant += 1
    return counts
