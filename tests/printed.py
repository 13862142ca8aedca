"""Graphs as text that does not depend on the names and numbers of nodes.

    mm_7 = aten.mm.default(view_3, primals_2) -> v2 = mm(v1, in1)   [40, 96]

Inputs, values and symbols of sizes are numbered in order. Values without a reader are left out.
"""

import re
from typing import Any

import torch
from torch import fx


def printed(gm: fx.GraphModule) -> str:
    """A graph as text: a line for every input and every call that is read."""
    names: dict[fx.Node, str] = {}
    lines = []
    for node in gm.graph.nodes:
        if node.op == "output":
            lines.append(f"return {_text(node.args[0], names)}")
        elif node.op in ("placeholder", "get_attr"):
            names[node] = f"in{sum(name.startswith('in') for name in names.values())}"
            lines.append(f"{names[node]}   {_size(node)}")
        elif node.users or node.is_impure():
            names[node] = f"v{sum(name.startswith('v') for name in names.values())}"
            arguments = [_text(x, names) for x in node.args]
            arguments += [f"{key}={_text(x, names)}" for key, x in node.kwargs.items()]
            call = f"{names[node]} = {_operator(node.target)}({', '.join(arguments)})"
            lines.append(f"{call}   {_size(node)}".rstrip())
    return _with_plain_symbols("\n".join(lines)) + "\n"


def _operator(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removeprefix("aten.").removesuffix(".default")
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _text(x: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(x, fx.Node):
        return names[x]
    if isinstance(x, list | tuple):
        return f"[{', '.join(_text(part, names) for part in x)}]"
    return str(x)


def _size(node: fx.Node) -> str:
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return ""
    dtype = str(val.dtype).removeprefix("torch.")
    shape = ", ".join(map(str, val.shape))
    return f"[{shape}]" + ("" if val.dtype == torch.float32 else f" {dtype}")


def _with_plain_symbols(text: str) -> str:
    """The text with the symbols of sizes numbered in order."""
    known: dict[str, str] = {}
    return re.sub(r"\bs\d+\b", lambda m: known.setdefault(m[0], f"s{len(known)}"), text)
