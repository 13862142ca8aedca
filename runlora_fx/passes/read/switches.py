"""Switches: calls that change the mode in which the nodes behind them run.

Graphs of torch functions switch modes by calls without a result:

    _set_grad_enabled(False)                 mode 0: the one that the graph starts in
    base = x @ w                      ->     mode 1: base passes no gradient on
    _set_grad_enabled(True)                  mode 0 again

A product under ``no_grad`` passes no gradient on and one under ``autocast`` rounds, so neither may
move across a switch. Graphs after AOTAutograd have no switches: their modes were traced away.

Invariant: two nodes in mode 0 run under the same grad, autocast, inference and functorch modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

#: Functions that switch the recording of gradients on or off.
_GRAD = ("_set_grad_enabled", "set_grad_enabled")

#: Prefix and suffix of the names of functions that enter a mode, and of those that leave it.
_ENTERS = ("_enter_", "_increment_nesting")
_EXITS = ("_exit_", "_decrement_nesting")

#: Prefixes of the names of functions that set a mode until the next call; leading and trailing
#: underscores are ignored.
_SETTERS = ("set_", "use_deterministic_algorithms")


def mode_of_nodes(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """The mode of every node of a graph that does not run in mode 0."""
    called = {id(node.target): node for node in nodes if node.op == "call_function"}
    if not any(_is_switch(_name(node)) for node in called.values()):
        return {}
    modes: dict[fx.Node, int] = {}
    entered: list[int] = []
    count, grad, initial_grad, settings = 0, None, None, 0
    for node in nodes:
        name = _name(node)
        if name in _GRAD:
            # The first switch tells what the graph starts with: the opposite.
            grad = bool(_argument(node))
            initial_grad = not grad if initial_grad is None else initial_grad
        elif name.startswith(_ENTERS[0]) or name.endswith(_ENTERS[1]):
            count += 1
            entered.append(count)
        elif name.startswith(_EXITS[0]) or name.endswith(_EXITS[1]):
            entered = entered[:-1]
        elif name.strip("_").startswith(_SETTERS):
            count += 1
            settings = count
        elif node.op != "output" and (entered or settings or grad != initial_grad):
            # Twice the number, plus one where gradients are not recorded as in the beginning.
            modes[node] = 2 * (entered[-1] if entered else settings) + (grad != initial_grad)
    return modes


def _is_switch(name: str) -> bool:
    """True if functions of a name switch a mode."""
    is_border = name.startswith((_ENTERS[0], _EXITS[0])) or name.endswith((_ENTERS[1], _EXITS[1]))
    return is_border or name in _GRAD or name.strip("_").startswith(_SETTERS)


def _name(node: fx.Node) -> str:
    """The name of a function; nothing for operators, methods and modules: those switch nothing."""
    is_operator = isinstance(node.target, torch._ops.OpOverload)
    is_function = node.op == "call_function" and not is_operator
    return str(getattr(node.target, "__name__", "")) if is_function else ""


def _argument(node: fx.Node) -> Any:
    return node.args[0] if node.args else next(iter(node.kwargs.values()))
