"""Lowering: module calls as functions, so that what they compute can be read; and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from runlora_fx.passes.levels.sizes import value_of


class Lowering:
    """The module calls of a graph, spelled out; what is not rewritten is put back."""

    def __init__(self, gm: fx.GraphModule) -> None:
        """Spell out every plain ``nn.Linear``, and what drops nothing, in place."""
        self._graph = gm.graph
        self._calls: dict[fx.Node, tuple[str, str]] = {}
        for node in list(gm.graph.nodes):
            if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
                continue
            module = gm.get_submodule(str(node.target))
            if _is_plain_linear(module):
                self._lower_linear(node, has_bias=module.bias is not None)
            elif _drops_nothing(module):
                self._lower(node, F.dropout, node.args[0], 0.0, False)

    def lift_attributes(self) -> None:
        """Read a result's dtype or device off an operand: a read result would have to exist.

        Needs example values (:func:`~runlora_fx.passes.read.example_values.annotate`).
        """
        for node in self._graph.nodes:
            if node.op != "call_function" or node.target is not getattr:
                continue
            while node.args[1] in ("dtype", "device") and node.args[0] in self._calls:
                below = node.args[0].args[0]
                here, there = value_of(node.args[0]), value_of(below)
                if here is None or there is None or here.dtype != there.dtype:
                    break
                node.args = (below, *node.args[1:])

    def undo(self) -> None:
        """Put back the calls that still compute what they did; drop what is left over."""
        alive = set(self._graph.nodes)
        for spelled, (target, name) in self._calls.items():
            if spelled in alive:
                with self._graph.inserting_before(spelled):
                    call = self._graph.call_module(target, (spelled.args[0],))
                call.name, call.meta = name, spelled.meta  # the name is free: its node is gone
                spelled.replace_all_uses_with(call)
                self._graph.erase_node(spelled)
        for node in alive:
            if node.op == "get_attr" and not node.users:
                self._graph.erase_node(node)

    def _lower_linear(self, node: fx.Node, *, has_bias: bool) -> None:
        with self._graph.inserting_before(node):
            weight = self._graph.get_attr(f"{node.target}.weight")
            bias = self._graph.get_attr(f"{node.target}.bias") if has_bias else None
        self._lower(node, F.linear, node.args[0], weight, bias)

    def _lower(self, node: fx.Node, target: Callable[..., Any], *args: Any) -> None:
        with self._graph.inserting_before(node):
            spelled = self._graph.call_function(target, args)
        spelled.meta = dict(node.meta)
        node.replace_all_uses_with(spelled)
        self._calls[spelled] = (str(node.target), node.name)
        self._graph.erase_node(node)


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether calling the module is exactly F.linear with its parameters."""
    return (
        type(module) is nn.Linear
        and not _is_hooked(module)
        and not parametrize.is_parametrized(module)
    )


def _drops_nothing(module: nn.Module) -> bool:
    """Whether calling the module is the identity, as long as its mode stays what it is."""
    if type(module) is nn.Dropout:
        return module.p == 0 and not module.inplace and not _is_hooked(module)
    return type(module) is nn.Identity and not _is_hooked(module)


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
