"""Shapes: an example tensor on every node, from metadata or from example inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from runlora_fx._torch_compat import fake_mode_of


def annotate(gm: fx.GraphModule, example_inputs: Sequence[Any] | None) -> None:
    """Give every node of a graph its ``meta["val"]``.

    Args:
        gm: The graph, annotated in place.
        example_inputs: One for each placeholder; None to rely on the metadata.

    Raises:
        ValueError: If there are neither metadata nor example inputs.
    """
    for node in gm.graph.nodes:
        if "val" not in node.meta and "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if example_inputs is None:
        missing = [node.name for node in placeholders if "val" not in node.meta]
        if missing:
            raise ValueError(
                f"rewrite() needs shapes: give example_inputs, or placeholders with meta['val'] "
                f"(missing on {', '.join(missing)})"
            )
        inputs = [node.meta["val"] for node in placeholders]
        if all("val" in n.meta for n in gm.graph.nodes if n.op != "output"):
            return
    else:
        inputs = list(pytree.arg_tree_leaves(*example_inputs))
        if len(inputs) != len(placeholders):
            raise ValueError(
                f"the graph has {len(placeholders)} inputs, got {len(inputs)} example inputs"
            )
    mode = fake_mode_of(inputs) or FakeTensorMode(allow_non_fake_inputs=True)
    fake = [
        mode.from_tensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) else x
        for x in inputs
    ]
    with torch.no_grad():
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*fake)
