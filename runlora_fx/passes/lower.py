"""Lowering: ``nn.Linear`` calls as ``F.linear``, so that their weights can be read; and back."""

from __future__ import annotations

from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize


class Lowering:
    """The module calls of a graph, spelled out; what is not rewritten is put back."""

    def __init__(self, gm: fx.GraphModule) -> None:
        """Spell out every plain ``nn.Linear`` call, in place."""
        self._graph = gm.graph
        self._calls: dict[fx.Node, tuple[str, str]] = {}
        for node in list(gm.graph.nodes):
            module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
            if module is not None and _is_plain(module) and len(node.args) == 1 and not node.kwargs:
                self._lower(node, has_bias=module.bias is not None)

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

    def _lower(self, node: fx.Node, *, has_bias: bool) -> None:
        graph = self._graph
        with graph.inserting_before(node):
            weight = graph.get_attr(f"{node.target}.weight")
            bias = graph.get_attr(f"{node.target}.bias") if has_bias else None
            spelled = graph.call_function(F.linear, (node.args[0], weight, bias))
        spelled.meta = dict(node.meta)
        node.replace_all_uses_with(spelled)
        self._calls[spelled] = (str(node.target), node.name)
        graph.erase_node(node)


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module is exactly F.linear with its parameters."""
    return (
        type(module) is nn.Linear
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not parametrize.is_parametrized(module)
    )
