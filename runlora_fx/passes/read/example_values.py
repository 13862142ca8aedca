"""Example values: a fake tensor on every node, with its shape, strides, dtype and device.

Example: ``annotate(gm, [x])`` runs the graph on fake tensors, and stores each in ``meta["val"]``.

Invariant: nothing is computed, and no parameter or buffer changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from runlora_fx._torch_names import FakeTensor, FakeTensorMode, pytree


def annotate(gm: fx.GraphModule, example_inputs: Sequence[Any] | None) -> None:
    """Give every node of a graph its ``meta["val"]``.

    Args:
        gm: The graph, annotated in place.
        example_inputs: One for each placeholder; None to rely on the metadata. Symbolic sizes in
            the metadata take precedence: they hold for more than one example.

    Raises:
        ValueError: If there are neither metadata nor example inputs, or the wrong number of inputs.
    """
    for node in gm.graph.nodes:
        if "val" not in node.meta and "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    given = None if example_inputs is None else list(pytree.arg_tree_leaves(*example_inputs))
    if given is not None and len(given) != len(placeholders):
        raise ValueError(
            f"the graph has {len(placeholders)} inputs, got {len(given)} example inputs"
        )
    if given is None or any(_is_symbolic(node.meta.get("val")) for node in placeholders):
        missing = [node.name for node in placeholders if "val" not in node.meta]
        if missing:
            raise ValueError(
                f"rewrite() needs shapes: give example_inputs, or placeholders with meta['val'] "
                f"(missing on {', '.join(missing)})"
            )
        known = [node.meta.get("val") for node in gm.graph.nodes if node.users]
        modes = _modes(known)
        if None not in known and len(modes) < 2:
            return
        given = [node.meta["val"] for node in placeholders]
    else:
        modes = _modes(given)
    # make_fx of real tensors gives every node a mode of its own, and modes do not mix.
    mode = modes[0] if len(modes) == 1 else FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad():
        _Propagation(gm, mode).propagate_dont_convert_inputs(*(_fake(x, mode) for x in given))


class _Propagation(FakeTensorProp):
    """Computes example tensors only: in-place operators do not modify parameters or buffers."""

    def run_node(self, n: fx.Node) -> Any:
        # In an export, a module without users checks the inputs. Running the check would fix
        # symbolic sizes to those of the example.
        if n.op == "call_module" and not n.users:
            return None
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._example(super().get_attr(target, args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        examples = {name: self._example(tensor) for name, tensor in state.items()}
        return torch.func.functional_call(module, examples, args, kwargs)

    def _example(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        return self._mode.from_tensor(value, static_shapes=True)


def _modes(values: Sequence[object]) -> list[FakeTensorMode]:
    return list(dict.fromkeys(x.fake_mode for x in values if isinstance(x, FakeTensor)))


def _fake(x: Any, mode: FakeTensorMode) -> Any:
    """An example value in the given mode."""
    if not isinstance(x, torch.Tensor) or getattr(x, "fake_mode", None) is mode:
        return x
    if not isinstance(x, FakeTensor):
        return mode.from_tensor(x)
    with mode:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _is_symbolic(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not all(isinstance(n, int) for n in value.shape)
