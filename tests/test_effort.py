"""What reading a graph costs, counted in calls of Python functions: the same on every machine."""

import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from types import FrameType
from typing import Any

import pytest
import torch
from recipes import adapted, tiny_llama, tokens
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from runlora_fx.cost_model.devices.machine import Machine
from runlora_fx.joint_pass import run
from runlora_fx.options import Options
from runlora_fx.passes.context import Context
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.levels.level import Dialect

OPTIONS = Options(objective="flops")
MACHINE = Machine(use_stored=False)

#: Calls of Python functions for each node of the graph.
READING, WHOLE_PASS = 84, 250


@cache
def _joint() -> fx.GraphModule:
    """The joint graph of a Llama of two layers with an adapter on each of its projections."""
    found: list[fx.GraphModule] = []

    def partition(joint: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        found.append(fx.GraphModule(joint, deepcopy(joint.graph)))
        return min_cut_rematerialization_partition(joint, *args, **kwargs)

    backend = aot_autograd(
        fw_compiler=lambda gm, _: gm,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    torch.manual_seed(0)
    model = adapted(tiny_llama(layers=2))
    batch = tokens()
    torch.compile(model, backend=backend, fullgraph=True)(input_ids=batch, labels=batch)
    return found[0]


def _graph() -> fx.Graph:
    joint = _joint()
    return fx.GraphModule(joint, deepcopy(joint.graph)).graph


def _calls(run: Callable[[], object]) -> int:
    """How many Python functions are called."""
    count = 0

    def see(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def _read(graph: fx.Graph) -> None:
    Context(graph, ATEN, OPTIONS, MACHINE).read()


def _rewrite(graph: fx.Graph) -> None:
    run(graph, ATEN, OPTIONS, MACHINE)


@pytest.mark.parametrize(("do", "most"), [(_read, READING), (_rewrite, WHOLE_PASS)])
def test_a_node_costs_few_calls(do: Callable[[fx.Graph], None], most: int) -> None:
    do(_graph())  # what is remembered from graph to graph is remembered
    graph = _graph()
    nodes = len(graph.nodes)
    assert _calls(lambda: do(graph)) < most * nodes


def test_the_form_of_a_node_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[fx.Node] = Counter()
    read = Dialect.read

    def counted(self: Dialect, node: fx.Node) -> Any:
        seen[node] += 1
        return read(self, node)

    monkeypatch.setattr(Dialect, "read", counted)
    graph = _graph()
    _read(graph)
    again = sum(count - 1 for count in seen.values())
    assert again < 0.1 * len(graph.nodes)
