"""Graph code: the Python code that builds a graph again, with all names and shapes.

    %mm = mm(x, w)  ->  mm = made.add("call_function", torch.ops.aten.mm.default, (x, w), name="mm")

Invariant: what the code builds has the same nodes in the same order, with the same names and the
same metadata as far as the pass reads it. What cannot be written raises an error.
"""

from __future__ import annotations

import importlib.util
import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import CheckpointPolicy

from runlora_fx._torch_compat import fake_mode_of
from runlora_fx._torch_debug import code_of_size, function_name, is_backed

#: The metadata that the pass reads besides example values.
_META = ("recompute", "partitioner_tag")

#: The names that the code uses itself.
_TAKEN = frozenset(
    [*("torch", "operator", "math", "made", "nn", "CheckpointPolicy", "FAKES", "INPUTS")]
)


class NotWritableError(Exception):
    """Something in a graph cannot be written as code."""


class GraphCode:
    """The code of one graph.

    Attributes:
        text: The function ``build`` that returns the graph, and ``INPUTS``.
        imports: The imports that it needs.
    """

    def __init__(self, graph: fx.Graph) -> None:
        """Write the code.

        Raises:
            NotWritableError: If something cannot be written.
        """
        self._symbols: dict[Any, int] = {}
        self._libraries: set[str] = set()
        self._mode = fake_mode_of(node.meta.get("val") for node in graph.nodes)
        functions = "\n\n".join(self._functions("build", graph))
        inputs = [self._value(n.meta.get("val")) for n in graph.find_nodes(op="placeholder")]
        sizes = [f"{symbol} = FAKES.size({hint})" for symbol, hint in self._symbols.items()]
        self.text = "\n".join([*sizes, "", "", functions, "", "", "INPUTS = ["])
        self.text += "".join(f"\n    {value}," for value in inputs) + "\n]"
        self.imports = (
            *("import math", "import operator", ""),
            *(f"import {name}" for name in sorted(self._libraries | {"torch"})),
            *("from torch import nn", "from torch.utils.checkpoint import CheckpointPolicy"),
        )

    def _functions(self, function: str, graph: fx.Graph) -> Iterator[str]:
        """The functions that build the graphs inside a graph, and then the graph itself."""
        names = _variables(graph)
        lines = [f"def {function}():", "    made = Builder()"]
        owner = graph.owning_module
        known: set[str] = set()
        for node in graph.nodes:
            target = str(node.target)
            if node.op in ("get_attr", "call_module") and target not in known:
                known.add(target)
                value = _attribute(owner, target)
                if isinstance(value, fx.GraphModule):
                    inner = f"{function}_{len(known)}"
                    yield from self._functions(inner, value.graph)
                    text = f"{inner}()"
                else:
                    text = self._value(value)
                lines.append(f"    made.attribute({target!r}, {text})")
            lines.append(f"    {names[node]} = made.add({self._arguments(node, names)})")
        lines.append("    return made.module()\n")
        yield "\n".join(lines)

    def _arguments(self, node: fx.Node, names: dict[fx.Node, str]) -> str:
        """The arguments of the call that adds a node."""
        is_function = node.op == "call_function"
        target = self._function(node.target) if is_function else repr(node.target)
        parts = [repr(node.op), target]
        if node.args or node.kwargs:
            parts.append(self._text(tuple(node.args), names))
        if node.kwargs:
            parts.append(self._text(dict(node.kwargs), names))
        parts.append(f"name={node.name!r}")
        parts += [f"{key}={_meta(node.meta[key])}" for key in _META if key in node.meta]
        return ", ".join(parts)

    def _function(self, target: Any) -> str:
        """The name of what a node calls."""
        if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            library = str(target).split(".")[0]
            if not hasattr(torch, library) and importlib.util.find_spec(library) is not None:
                self._libraries.add(library)  # its operators exist once it is imported
            return f"torch.ops.{target}"
        if isinstance(target, torch._ops.HigherOrderOperator):
            return f"torch.ops.higher_order.{target.__name__}"
        called = getattr(target, "__name__", "")
        if getattr(operator, called, None) is target:
            return f"operator.{called}"
        name = function_name(target)
        if not name.startswith(("torch.", "math.")):
            raise NotWritableError(f"the graph calls {name}")
        return name

    def _value(self, value: Any) -> str:
        """An input or an attribute of a graph."""
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided:
                raise NotWritableError(f"a tensor of layout {value.layout}")
            shape, strides = map(self._sizes, (value.shape, value.stride()))
            return f"FAKES.tensor({shape}, {strides}, {value.dtype}, {str(value.device)!r})"
        if isinstance(value, torch.SymInt):
            return self._size(value)
        is_plain = type(value).__module__.startswith("torch.nn.modules.")
        if isinstance(value, nn.Module) and is_plain and not list(value.children()):
            dtype = next((p.dtype for p in value.parameters()), torch.get_default_dtype())
            return f"nn.{value!r}.to({dtype}).train({value.training})"
        return self._text(value, {})

    def _sizes(self, sizes: Iterable[Any]) -> str:
        return f"({''.join(f'{self._size(size)}, ' for size in sizes)})"

    def _size(self, size: Any) -> str:
        """A size, as an expression of symbols."""
        if isinstance(size, int):
            return str(size)
        if not is_backed(size):
            raise NotWritableError(f"the size {size} is known at run time only")
        text, hints = code_of_size(size, self._mode)
        self._symbols.update(hints)
        return text

    def _text(self, x: Any, names: dict[fx.Node, str]) -> str:
        """An argument of a call."""
        if isinstance(x, fx.Node):
            return names[x]
        if isinstance(x, dict):
            items = [f"{key!r}: {self._text(value, names)}" for key, value in x.items()]
            return f"{{{', '.join(items)}}}"
        if isinstance(x, tuple):
            return f"({''.join(f'{self._text(part, names)}, ' for part in x)})"
        if isinstance(x, list):
            return f"[{', '.join(self._text(part, names) for part in x)}]"
        if isinstance(x, slice):
            parts = (self._text(part, names) for part in (x.start, x.stop, x.step))
            return f"slice({', '.join(parts)})"
        if isinstance(x, float) and not math.isfinite(x):
            return f"float({str(x)!r})"
        if x is None or x is Ellipsis or isinstance(x, bool | int | float | complex | str):
            return repr(x)
        if isinstance(x, torch.dtype | torch.layout | torch.memory_format):
            return str(x)
        if isinstance(x, torch.device):
            return f"torch.device({str(x)!r})"
        if callable(x):
            return self._function(x)
        raise NotWritableError(f"an argument of type {type(x).__name__}")


def _variables(graph: fx.Graph) -> dict[fx.Node, str]:
    """The variable of each node: its name, unless the code uses that itself."""
    return {
        node: f"{node.name}__"
        if node.name in _TAKEN or node.name.startswith("build")
        else node.name
        for node in graph.nodes
    }


def _attribute(owner: Any, target: str) -> Any:
    for part in target.split("."):
        owner = getattr(owner, part)
    return owner


def _meta(value: Any) -> str:
    return f"CheckpointPolicy.{value.name}" if isinstance(value, CheckpointPolicy) else repr(value)
