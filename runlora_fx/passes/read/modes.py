"""Modes: what runs under another grad or autocast mode than the rest of the graph.

Torch-level graphs switch modes by calls without a result. A product under ``no_grad`` passes no
gradient on and one under ``autocast`` rounds, so neither may move across the switch. Graphs after
AOTAutograd have no such calls: there the modes have been traced away.
"""

from __future__ import annotations

from typing import Any

from torch import fx


def switched_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes between the switch to another mode and the switch back."""
    switched: set[fx.Node] = set()
    depth, grad, initial_grad = 0, None, None
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "_set_grad_enabled":
            # The first switch tells what the graph starts with: the opposite.
            grad = bool(_argument(node))
            initial_grad = not grad if initial_grad is None else initial_grad
        elif name.startswith("_enter_") or name.endswith("_increment_nesting"):
            depth += 1
        elif name.startswith("_exit_") or name.endswith("_decrement_nesting"):
            depth -= 1
        elif depth or grad != initial_grad:
            switched.add(node)
    return switched


def _argument(node: fx.Node) -> Any:
    return node.args[0] if node.args else next(iter(node.kwargs.values()))
