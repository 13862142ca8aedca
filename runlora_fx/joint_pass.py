"""The pass as Inductor's ``joint_custom_pre_pass``: it never breaks a compilation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from runlora_fx import __version__, history
from runlora_fx._torch_compat import never_overwrite
from runlora_fx.cost_model.devices.machine import Machine
from runlora_fx.options import Options
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.pipeline import rewrite_graph
from runlora_fx.report.data import Refusal, Report

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
    parameters: Sequence[int] = (),
) -> Report:
    """Rewrite a graph in place and record the report; on failure the graph stays as it came.

    Args:
        graph: The graph.
        dialect: Its level.
        options: What is asked of the pass.
        machine: What is known about the devices; what is stored about them, if None.
        may_guard: Whether the graph is being compiled for Dynamo, which checks guards on sizes.
        parameters: Which of the graph's inputs are parameters, the same tensors in every call.

    Raises:
        Exception: Under ``strict``, whatever went wrong.
    """
    try:
        report = rewrite_graph(
            graph, dialect, options, machine, may_guard=may_guard, parameters=parameters
        )
    except Exception as error:
        if options.strict:
            raise
        _log.warning(
            "runlora failed and leaves this graph as it came; please report this "
            "(options={'runlora.strict': True} raises instead): %s: %s",
            type(error).__name__,
            error,
            exc_info=_log.isEnabledFor(logging.DEBUG),
        )
        refusal = Refusal(f"the pass failed: {type(error).__name__}: {error}", ("this graph",))
        report = Report(graph=dialect.graph, refusals=(refusal,))
    history.record(report)
    return report


def _is_seen(graph: fx.Graph) -> bool:
    """Whether the pass has seen all operators of a graph, or of one that it was cut from.

    Inductor calls the pass again for the forward and for the backward of a nested compile region,
    after their joint graph; and the pass may stand in a list twice.
    """
    operators = [node for node in graph.nodes if node.op == "call_function"]
    return bool(operators) and all(_SEEN in node.meta for node in operators)


class RunloraPass(CustomGraphPass):
    """The rewrite for Inductor; also usable as ``torch._inductor.config.joint_custom_pre_pass``.

    A graph is rewritten once, however often the pass is called with it or with parts of it. Under
    ``backend="runlora"`` the backend's own pass and options take the place of this one.

    Attributes:
        ran: Whether it was called: it is not when compiled code comes from a cache.
    """

    def __init__(
        self,
        options: Options | None = None,
        before: Sequence[Callable[[fx.Graph], None]] = (),
        parameters: Sequence[int] = (),
    ) -> None:
        """Prepare the pass.

        Args:
            options: What is asked of the pass.
            before: The user's own joint passes, run first.
            parameters: Which of the graph's inputs are parameters; used by the option ``reuse``.
        """
        self._options = Options() if options is None else options
        self._before = tuple(before)
        self._parameters = tuple(parameters)
        if self._options.reuse:
            # Compiled code must not put another value where a kept weight lies.
            never_overwrite(torch.ops.runlora.merged_weight.default)
        # A snapshot: the plan and the identity speak of the same numbers.
        self._machine = Machine(use_stored=self._options.tune != "off")
        self.ran = False

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite the graph in place."""
        self.ran = True
        for user_pass in self._before:
            user_pass(graph)
        if _is_seen(graph):
            return
        run(graph, ATEN, self._options, self._machine, may_guard=True, parameters=self._parameters)
        for node in graph.nodes:
            node.meta[_SEEN] = True

    def uuid(self) -> Any | None:
        """What a compiled graph depends on; None (no caching) if a user's pass has no identity."""
        others = [getattr(user_pass, "uuid", lambda: None)() for user_pass in self._before]
        if not all(others):
            return None
        # Counting FLOPs needs no machine.
        machine = self._machine.identity() if self._options.objective == "time" else None
        settings = (astuple(self._options), self._parameters)
        return ("runlora", __version__, _source_hash(), settings, machine, tuple(others))


@cache
def _source_hash() -> bytes:
    """A hash of our own source: another version must not be served our compiled graphs."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return get_hash_for_files(tuple(map(str, files)))
