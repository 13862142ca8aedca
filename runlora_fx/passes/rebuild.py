"""Rebuilding: what the files call that reproduce a failure.

    fakes, made = Fakes(), Builder()
    x = made.add("placeholder", "x", name="x")
    y = made.add("call_function", torch.ops.aten.mm.default, (x, x), name="mm")
    made.add("output", "output", (y,), name="output")
    rewrite_again(made.module(), [fakes.tensor((4, 4), (4, 1), torch.float32, "cpu")], ...)

Invariant: tensors are fake. They take no memory, and no device is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from runlora_fx._torch_debug import keeping_symbols, symbolic_mode, symbolic_size
from runlora_fx.options import Options
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.levels.differentiable import level_of
from runlora_fx.passes.pipeline import rewrite_graph
from runlora_fx.passes.read.example_values import annotate
from runlora_fx.report.data import Report


class Fakes:
    """Makes fake tensors and symbolic sizes that belong together."""

    def __init__(self) -> None:
        """Start without symbols."""
        self._mode = symbolic_mode()

    def size(self, hint: int) -> torch.SymInt:
        """A symbolic size, and what it was when the graph was traced."""
        return symbolic_size(self._mode, hint)

    def tensor(
        self, shape: Sequence[Any], strides: Sequence[Any], dtype: torch.dtype, device: str
    ) -> torch.Tensor:
        """A tensor without data."""
        with self._mode:
            return torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device=device)


@dataclass
class Builder:
    """Builds a graph node by node, and the module whose attributes it reads."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    root: nn.Module = field(default_factory=nn.Module)

    def add(
        self,
        op: str,
        target: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        name: str,
        **meta: Any,
    ) -> fx.Node:
        """Add a node of a name and with metadata."""
        node = self.graph.create_node(op, target, args, kwargs or {}, name)
        node.meta.update(meta)
        return node

    def attribute(self, target: str, value: Any) -> None:
        """Set an attribute of the module; the modules on the way to it are made."""
        *path, name = target.split(".")
        owner = self.root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        setattr(owner, name, value)

    def module(self) -> fx.GraphModule:
        """The graph, with its module."""
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)


def rewrite_again(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    is_aten: bool,
    may_guard: bool,
    joins_in_place: bool,
    parameters: Sequence[int],
    options: Mapping[str, Any],
) -> Report:
    """Rewrite a graph as it was rewritten when the file was written, under ``strict``.

    Args:
        gm: The graph.
        inputs: Its example inputs.
        is_aten: True if it came from AOTAutograd.
        may_guard: True if Dynamo compiled it.
        joins_in_place: True if what compiled it joins matrices without copies.
        parameters: Positions of the inputs that are parameters.
        options: The options of the pass.

    Raises:
        Exception: What fails.
    """
    with keeping_symbols():
        annotate(gm, inputs)
    return rewrite_graph(
        gm.graph,
        ATEN if is_aten else level_of(gm.graph),
        Options.of({**options, "strict": True}),
        may_guard=may_guard,
        joins_in_place=joins_in_place,
        parameters=parameters,
    )
