"""Transactions: whatever goes wrong in one, the graph is as it was."""

from collections.abc import Callable

import pytest
import torch
from torch import fx

from runlora_fx.passes.emit.graph.transaction import transaction

aten = torch.ops.aten


def _graph() -> fx.Graph:
    """``(x w + x a) w, x``; every node has metadata."""
    graph = fx.Graph()
    x, w, a = (graph.placeholder(name) for name in "xwa")
    left, right = graph.call_function(aten.mm, (x, w)), graph.call_function(aten.mm, (x, a))
    total = graph.call_function(aten.add, (left, right), {"alpha": 2})
    graph.output((graph.call_function(aten.mm, (total, w)), [x]))
    for i, node in enumerate(graph.nodes):
        node.meta = {"number": i}
    return graph


def _described(graph: fx.Graph) -> list[tuple[object, ...]]:
    return [(n.name, n.op, n.target, str(n.args), str(n.kwargs), dict(n.meta)) for n in graph.nodes]


def _insert(graph: fx.Graph) -> None:
    first = next(n for n in graph.nodes if n.op == "call_function")
    with graph.inserting_before(first):
        new = graph.call_function(aten.neg, (first.args[0],))
    first.args = (new, *first.args[1:])


def _replace_and_erase(graph: fx.Graph) -> None:
    total = next(n for n in graph.nodes if n.target is aten.add)
    with graph.inserting_before(total):
        new = graph.call_function(aten.sub, total.args)
    total.replace_all_uses_with(new)
    graph.erase_node(total)
    new.name = "add"


def _erase_all_products(graph: fx.Graph) -> None:
    x = next(iter(graph.nodes))
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function":
            node.replace_all_uses_with(x)
            graph.erase_node(node)


def _tag(graph: fx.Graph) -> None:
    for node in graph.nodes:
        node.meta["recompute"] = True
    next(iter(graph.nodes)).meta = {}


def _move(graph: fx.Graph) -> None:
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    nodes[1].append(nodes[0])


CHANGES: dict[str, Callable[[fx.Graph], None]] = {
    "insert": _insert,
    "replace": _replace_and_erase,
    "erase all": _erase_all_products,
    "tag": _tag,
    "move": _move,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_failure_leaves_the_graph_as_it_was(change: str) -> None:
    graph = _graph()
    before, nodes = _described(graph), list(graph.nodes)
    with pytest.raises(RuntimeError, match="out of luck"), transaction(graph):
        CHANGES[change](graph)
        raise RuntimeError("out of luck")
    assert _described(graph) == before
    graph.lint()
    assert {n.name: len(n.users) for n in graph.nodes} == {
        n.name: len(n.users) for n in _graph().nodes
    }
    if change != "replace" and change != "erase all":
        assert list(graph.nodes) == nodes


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_stays(change: str) -> None:
    graph, other = _graph(), _graph()
    with transaction(graph):
        CHANGES[change](graph)
    CHANGES[change](other)
    assert _described(graph) == _described(other)


def test_a_graph_that_does_not_lint_is_taken_back() -> None:
    graph = _graph()
    before = _described(graph)
    nodes = {n.name: n for n in graph.nodes}
    with pytest.raises(RuntimeError, match="used before"), transaction(graph):
        nodes["w"].append(nodes["add"])  # in front of what it adds
    assert _described(graph) == before


def test_what_was_added_out_of_order_is_taken_back() -> None:
    graph = _graph()
    before = _described(graph)
    with pytest.raises(RuntimeError, match="halfway"), transaction(graph):
        total = next(n for n in graph.nodes if n.target is aten.add)
        with graph.inserting_before(total):
            new = graph.call_function(aten.neg, tuple(total.args[:1]))
        with graph.inserting_before(new):
            graph.call_function(aten.neg, (new,))
        raise RuntimeError("halfway")
    assert _described(graph) == before


def test_transactions_nest() -> None:
    graph = _graph()
    before = _described(graph)
    with pytest.raises(ValueError, match="outer"), transaction(graph):
        _insert(graph)
        halfway = _described(graph)
        with pytest.raises(RuntimeError, match="inner"), transaction(graph):
            _replace_and_erase(graph)
            raise RuntimeError("inner")
        assert _described(graph) == halfway
        raise ValueError("outer")
    assert _described(graph) == before
