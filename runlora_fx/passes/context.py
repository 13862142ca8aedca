"""Context: what a pass is given: the graph, its level, the options, the machine.

A pass takes a context, changes ``context.graph``, and returns what it found:

    def plan_linear_algebra(context: Context) -> Outcome

Invariant: a context does not change, except for its list of failures. Passes change the graph, so
:meth:`Context.effects` and :meth:`Context.read` analyse it again at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from runlora_fx._torch_compat import draws_again, fake_mode_of, guard_range, is_current
from runlora_fx.cost_model.devices.machine import Machine
from runlora_fx.cost_model.devices.registry import computing, kind_of
from runlora_fx.options import Options
from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.levels.sizes import facts_of
from runlora_fx.passes.read.analysis import Analysis, hint_of
from runlora_fx.passes.read.casts import Casts
from runlora_fx.passes.read.effects import Effects

#: By value of the option ``numerics``, how casts between floats are read.
_CASTS: dict[str, Casts] = {"strict": "kept", "default": "joined", "relaxed": "crossed"}


@dataclass(frozen=True)
class Failure:
    """A part of a graph that stays as it came because something failed.

    Attributes:
        nodes: The names of the nodes that stay.
        error: The error.
    """

    nodes: tuple[str, ...]
    error: Exception


@dataclass(frozen=True)
class Recomputation:
    """What the backward recomputes besides what plans ask for, and what that saves.

    Attributes:
        tensors: How many activations it recomputes.
        drawn: How many dropout masks it draws again.
        packed: How many dropout masks the forward saves as bits.
        fewer_bytes: How much less the forward saves for the backward, as predicted [B].
    """

    tensors: int = 0
    drawn: int = 0
    packed: int = 0
    fewer_bytes: int = 0

    def __add__(self, other: Recomputation) -> Recomputation:
        """Both together."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Recomputation(*(one + another for one, another in pairs))


#: Nothing is recomputed besides.
NOTHING = Recomputation()


@dataclass(frozen=True)
class Outcome:
    """What a pass did.

    Attributes:
        findings: The regions that it found, for the report to describe.
        is_joint: True if the graph has a forward and a backward.
        stacked: By stack, how many products became one.
        recomputation: What the backward recomputes besides.
        seconds: The predicted time of all products that were read, before and after [s]. None if
            plans were ranked by FLOPs.
    """

    findings: tuple[Any, ...] = ()
    is_joint: bool = False
    stacked: tuple[int, ...] = ()
    recomputation: Recomputation = NOTHING
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Context:
    """One graph to rewrite, and what passes need to know about it.

    Attributes:
        graph: Every tensor node has an example tensor in ``meta["val"]``.
        level: The level of the graph.
        options: The options of the pass.
        machine: The profiles of the devices.
        may_guard: True if Dynamo compiles the graph. It checks guards on symbolic sizes before each
            call, and compiles again for a size outside of them.
        joins_in_place: True if what compiles the graph computes matrices into their places in a
            larger one. Inductor does so, but not for products that it tunes.
        parameters: Positions of the inputs that are parameters, the same tensors in every call.
        failures: The parts that failed so far. Passes add to it.
        reproduced: Writes a file that reproduces an error, and returns what a warning says of it:
            ", with the file ..."; empty if there is none.
    """

    graph: fx.Graph
    level: Dialect
    options: Options
    machine: Machine
    may_guard: bool = False
    joins_in_place: bool = False
    parameters: tuple[int, ...] = ()
    failures: list[Failure] = field(default_factory=list)
    reproduced: Callable[[Exception], str] = lambda _: ""

    # -- sizes ---------------------------------------------------------------------------------

    @cached_property
    def mode(self) -> Any:
        """The fake mode of the example tensors; None if they are real."""
        return fake_mode_of(node.meta.get("val") for node in self.graph.nodes)

    def hint(self, size: Dim) -> int:
        """The size that a dimension had when the graph was traced."""
        return hint_of(size, self.mode)

    def guard(self, size: sympy.Expr, low: int, high: int | None) -> bool:
        """Add the guard ``low <= size < high`` to the compiled code; False if that fails."""
        return self.may_guard and guard_range(size, low, high, self.mode)

    def is_current(self, size: Dim) -> bool:
        """True unless a guard has replaced a symbolic size by a number."""
        return isinstance(size, int) or is_current(size, self.mode)

    # -- the graph -----------------------------------------------------------------------------

    @cached_property
    def device(self) -> torch.device:
        """The device that computes: an accelerator if some tensor is on one, else the CPU."""
        known = [facts_of(node) for node in self.graph.nodes]
        return computing(dict.fromkeys(facts.kind.device for facts in known if facts is not None))

    @property
    def draws_again(self) -> bool:
        """True if Inductor draws the same random numbers again in another kernel."""
        return draws_again(in_fours=kind_of(self.device).draws_in_fours)

    @cached_property
    def lasting(self) -> tuple[fx.Node, ...]:
        """The inputs whose merged weights may be kept between calls (option ``reuse``)."""
        if not self.options.reuse:
            return ()
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        return tuple(inputs[i] for i in self.parameters)

    def effects(self) -> Effects:
        """The effects of the graph as it is now."""
        return Effects(self.graph)

    def read(self) -> Analysis:
        """The linear algebra of the graph as it is now."""
        return Analysis(self.graph, self.level, casts=_CASTS[self.options.numerics])
