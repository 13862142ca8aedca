"""Joint pass: the rewrite as Inductor's ``joint_custom_pre_pass``.

Joint graph of a model with LoRA layers -> the same graph, rewritten in place, and a report.

Invariant: a failure of the pass never breaks a compilation, unless ``strict`` is set.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import fx

from runlora_fx import __version__, history, logs, plug_in
from runlora_fx._torch_compat import joins_in_place as inductor_joins_in_place
from runlora_fx._torch_compat import never_overwrite
from runlora_fx._torch_debug import compiled_modules
from runlora_fx._torch_names import CustomGraphPass, get_hash_for_files
from runlora_fx.cost_model.devices.elsewhere import machine_for
from runlora_fx.cost_model.devices.machine import Machine
from runlora_fx.inactive import inactive
from runlora_fx.options import Options
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.pipeline import rewrite_graph
from runlora_fx.passes.reproducer import Reproducer, Run
from runlora_fx.report.data import Refusal, Report
from runlora_fx.report.describe.price_causes import FAILED

_log = logging.getLogger("runlora_fx")

#: Metadata of the nodes of graphs that the pass has seen; torch copies it with the nodes.
_SEEN = "runlora_seen"


def run(
    graph: fx.Graph,
    dialect: Dialect,
    options: Options,
    machine: Machine | None = None,
    *,
    may_guard: bool = False,
    joins_in_place: bool = False,
    parameters: Sequence[int] = (),
) -> Report:
    """Rewrite a graph in place and record the report; a failure leaves the graph unchanged.

    Args:
        graph: The graph.
        dialect: How its operators are read.
        options: The options of the pass.
        machine: The profiles of the devices; those that are stored, if None.
        may_guard: True if Dynamo compiles the graph, and will check guards on sizes.
        joins_in_place: True if what compiles the graph joins matrices without copies.
        parameters: Positions of the inputs that are parameters, the same tensors in every call.

    Raises:
        Exception: Under ``strict``, whatever went wrong.
    """
    began, came = perf_counter(), ""
    with _telling(options):
        came = logs.before(graph)
    try:
        report = rewrite_graph(
            graph,
            dialect,
            options,
            machine,
            may_guard=may_guard,
            joins_in_place=joins_in_place,
            parameters=parameters,
        )
    except Exception as error:
        if options.strict:
            raise
        given = Run(dialect, options, may_guard, joins_in_place, tuple(parameters))
        _log.warning(
            "runlora failed and leaves this graph as it came; please report this%s "
            "(options={'runlora.strict': True} raises instead): %s: %s",
            Reproducer(lambda: graph, given)(error),
            type(error).__name__,
            error,
            exc_info=_log.isEnabledFor(logging.DEBUG),
        )
        why = f"the pass failed: {type(error).__name__}: {error}"
        refusal = Refusal(why, ("this graph",), FAILED)
        report = Report(graph=dialect.graph, refusals=(refusal,))
    if not report.sites:
        report = replace(report, refusals=(*report.refusals, *_inactive()))
    report = replace(report, planning_seconds=perf_counter() - began)
    with _telling(options):
        logs.show(report, came, graph)
    with _telling(options):
        history.record(report)
    return report


@contextmanager
def _telling(options: Options) -> Iterator[None]:
    """A context in which the user is told what was done: a failure costs no compilation."""
    try:
        yield
    except Exception as error:
        if options.strict:
            raise
        _log.warning(
            "runlora could not say what it did; please report this "
            "(options={'runlora.strict': True} raises instead): %s: %s",
            type(error).__name__,
            error,
        )


def _inactive() -> tuple[Refusal, ...]:
    """What is said about adapters that take no part in the graph."""
    try:
        return tuple(inactive(compiled_modules()))
    except Exception as error:  # of a module that is not PEFT's after all
        _log.info("runlora could not look for adapters: %s: %s", type(error).__name__, error)
        return ()


def _is_seen(graph: fx.Graph) -> bool:
    """True if the pass has seen every operator of a graph.

    Inductor calls the pass on the joint graph of a nested compile region, and then again on its
    forward and on its backward. A list of passes may also contain the pass twice.
    """
    operators = [node for node in graph.nodes if node.op == "call_function"]
    return bool(operators) and all(_SEEN in node.meta for node in operators)


class RunloraPass(CustomGraphPass):
    """The rewrite for Inductor, usable as ``torch._inductor.config.joint_custom_pre_pass``.

    A graph is rewritten once, however often the pass is called on it or on parts of it. Under
    ``backend="runlora"`` the backend's own pass and options replace this one.

    Attributes:
        ran: True once it was called. It is not called if the compiled code comes from a cache.
        found: True if a graph had low-rank algebra.
    """

    def __init__(
        self,
        options: Options | None = None,
        before: Sequence[Callable[[fx.Graph], None]] = (),
        parameters: Sequence[int] = (),
        machine: Machine | None = None,
    ) -> None:
        """Prepare the pass.

        Args:
            options: The options of the pass.
            before: The user's own joint passes, run first.
            parameters: Positions of the inputs that are parameters; used by the option ``reuse``.
            machine: What plans are made for; the stored profiles of this machine if None. It is a
                snapshot, so that plans and cache key are made from the same numbers.
        """
        self._options = Options() if options is None else options
        self._before = tuple(before)
        self._parameters = tuple(parameters)
        if self._options.reuse:
            # Compiled code must not reuse the memory of a kept weight.
            never_overwrite(torch.ops.runlora.merged_weight.default)
        if machine is None:
            uses_stored = self._options.tune != "off"
            machine = machine_for(self._options.device, use_stored=uses_stored)
        self._machine = machine
        self.ran = False
        self.found = False

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite the graph in place."""
        self.ran = True
        for user_pass in self._before:
            user_pass(graph)
        if _is_seen(graph):
            return
        report = run(
            graph,
            ATEN,
            self._options,
            self._machine,
            may_guard=True,
            joins_in_place=inductor_joins_in_place(),
            parameters=self._parameters,
        )
        self.found |= bool(report.sites)
        for node in graph.nodes:
            node.meta[_SEEN] = True
        plug_in.ran()

    def uuid(self) -> Any | None:
        """The key of the pass in Inductor's caches; None (no caching) if a user's pass has none."""
        identity = self.identity()
        plug_in.looked_for(identity)
        return identity

    def identity(self) -> Any | None:
        """What the pass makes of a graph depends on it; None if a user's pass has none."""
        others = [getattr(user_pass, "uuid", lambda: None)() for user_pass in self._before]
        if not all(others):
            return None
        try:
            # FLOPs do not depend on the machine.
            machine = self._machine.identity() if self._options.objective == "time" else None
            settings = (astuple(self._options), self._parameters)
            return ("runlora", __version__, _source_hash(), settings, machine, tuple(others))
        except Exception as error:
            if self._options.strict:
                raise
            _log.warning(
                "runlora could not identify itself, so the code of this graph goes to no cache; "
                "please report this (options={'runlora.strict': True} raises instead): %s: %s",
                type(error).__name__,
                error,
            )
            return None


@cache
def _source_hash() -> bytes:
    """A hash of our source, so that no version uses compiled graphs of another."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return get_hash_for_files(tuple(map(str, files)))
