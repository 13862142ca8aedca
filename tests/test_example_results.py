"""Example results that are made without their call are what the call returns."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from runlora_fx.passes.emit.nodes.example_results import ExampleResults

aten = torch.ops.aten
A, B, STACK = ((6, 4), torch.float32), ((4, 8), torch.float32), ((3, 4, 5), torch.float64)

#: Calls on x (6, 4), y (4, 8) and stack (3, 4, 5), as emission writes them.
CALLS: dict[str, tuple[Any, Callable[..., tuple[Any, ...]], dict[str, Any]]] = {
    "mm": (aten.mm.default, lambda x, y, s: (x, y), {}),
    "addmm": (aten.addmm.default, lambda x, y, s: (x, x, x[:4]), {"alpha": 2}),
    "bmm": (aten.bmm.default, lambda x, y, s: (s, s.mT), {}),
    "add": (aten.add.Tensor, lambda x, y, s: (x, x), {}),
    "add a number": (aten.add.Tensor, lambda x, y, s: (x, 1.5), {}),
    "mul": (aten.mul.Tensor, lambda x, y, s: (x, 2.0), {}),
    "promoting mul": (aten.mul.Tensor, lambda x, y, s: (x, s.new_empty(())), {}),
    "permute": (aten.permute.default, lambda x, y, s: (s, [0, 2, 1]), {}),
    "view": (aten.view.default, lambda x, y, s: (x, [-1, 2]), {}),
    "select": (aten.select.int, lambda x, y, s: (s, 0, 1), {}),
    "reshape that views": (aten.reshape.default, lambda x, y, s: (x, [3, 8]), {}),
    "reshape that copies": (aten.reshape.default, lambda x, y, s: (y.T, [4, 8]), {}),
    "expand": (aten.expand.default, lambda x, y, s: (x[:1], [7, -1]), {}),
    "sum": (aten.sum.dim_IntList, lambda x, y, s: (s, [0, 1], True), {}),
    "cast": (aten.to.dtype, lambda x, y, s: (x, torch.bfloat16), {}),
    "cast to the same": (aten.to.dtype, lambda x, y, s: (x, torch.float32), {}),
    "copy": (
        aten.clone.default,
        lambda x, y, s: (y.T,),
        {"memory_format": torch.contiguous_format},
    ),
    "full": (aten.full.default, lambda x, y, s: ([6, 1], 1.0), {"dtype": torch.float32}),
    "matmul": (torch.matmul, lambda x, y, s: (x, y), {}),
    "einsum": (torch.einsum, lambda x, y, s: ("ab,ab->a", [x, x]), {}),
}


def layout(value: Tensor) -> tuple[Any, ...]:
    """All that a fake tensor shows."""
    kind = (value.dtype, value.device, value.requires_grad, type(value))
    return (tuple(value.shape), value.stride(), value.storage_offset(), *kind)


def shares(value: Tensor, args: Any) -> list[bool]:
    """With which tensors among arguments a result shares memory."""
    flat = [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]
    mine = value.untyped_storage()._cdata
    return [mine == x.untyped_storage()._cdata for x in flat if isinstance(x, Tensor)]


def on_nodes(graph: fx.Graph, args: Any) -> Any:
    """Arguments with a node in the place of each tensor."""

    def node(x: Any) -> Any:
        if isinstance(x, list):
            return [node(y) for y in x]
        if not isinstance(x, Tensor):
            return x
        made = graph.placeholder(f"t{len(graph.nodes)}")
        made.meta["val"] = x
        return made

    return tuple(map(node, args))


@pytest.mark.parametrize("name", CALLS)
def test_a_known_result_is_what_the_call_returns(name: str) -> None:
    target, arguments, kwargs = CALLS[name]
    mode = FakeTensorMode()
    results, graph = ExampleResults(mode), fx.Graph()
    for _ in range(2):  # the second time on other tensors
        with mode, torch.no_grad():
            x, y, s = (torch.empty(shape, dtype=dtype) for shape, dtype in (A, B, STACK))
            args = arguments(x, y, s)
            wanted = target(*args, **kwargs)
        found = results(target, on_nodes(graph, args), kwargs)
        assert layout(found) == layout(wanted)
        assert isinstance(found, FakeTensor)
        assert found.fake_mode is mode
        assert shares(found, args) == shares(wanted, args)
    assert len(results._known) == 1


def test_a_symbolic_size_is_never_taken_for_a_known_one() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    results, graph = ExampleResults(mode), fx.Graph()
    for size in (6, 9):
        x = torch.empty(size, 4)
        torch._dynamo.mark_dynamic(x, 0)
        fake = mode.from_tensor(x)
        node = on_nodes(graph, (fake,))
        found = results(aten.mul.Tensor, (*node, 2.0), {})
        assert isinstance(found.shape[0], torch.SymInt)
        assert found.shape[0].node.expr == fake.shape[0].node.expr
    assert not results._known
