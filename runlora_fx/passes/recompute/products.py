"""Products: results of the forward's products that the backward computes again.

    v = n Wv';  attention(q, k, v)          v is saved for the gradient of attention
    ->  Chain(made=v, nodes=(v,), sources=(h, rstd))         with n = norm(h), which is recomputed

A product takes as many FLOPs for each element that is not saved as twice its inner dimension. That
is far more than pointwise operators take, so products come after all of those.

Invariant: all that a product is computed from is saved, or computed in the backward, anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from runlora_fx.cost_model.cost import Cost
from runlora_fx.cost_model.ops import MatMul
from runlora_fx.passes.levels.operators import VIEWS, readers_of
from runlora_fx.passes.levels.sizes import example_of, shape_of
from runlora_fx.passes.recompute.chains import Chain, Chains

_aten = torch.ops.aten

#: By operator, the position of the left operand.
_OPERANDS: dict[object, int] = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1}

#: The most operators that a product is recomputed with.
_MOST_NODES = 64


def choose_products(
    chains: Chains,
    price: Callable[[Cost], float],
    limit: float,
    per_byte: float,
) -> list[Chain]:
    """The products to recompute, those that take least time for a byte first.

    Args:
        chains: The chains of a graph, after all others were chosen. They take note of the products.
        price: The time of a cost [s].
        limit: The time for all together [s].
        per_byte: The time that a product may take for each byte that is not saved [s].
    """
    chosen: list[Chain] = []
    saved = _Saved(chains)
    for offer in sorted(saved.products(), key=lambda chain: price(chain.cost) / chain.size):
        chain = saved.product(offer.made)  # those that were taken meanwhile have changed it
        if chain is None:
            continue
        seconds = price(chain.cost)
        if seconds <= min(limit, per_byte * chain.size):
            limit -= seconds
            saved.take(chain)
            chosen.append(chain)
    return chosen


class _Saved:
    """The tensors that are saved once all other chains are chosen.

    A node's *cut* is what pointwise operators compute it from: saved tensors. A sum of two saved
    tensors is saved itself.
    """

    def __init__(self, chains: Chains) -> None:
        self._chains = chains
        self._order = {node: i for i, node in enumerate(chains.forward)}
        self._cuts: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in chains.forward:
            none = frozenset[fx.Node]()
            below = none.union(*(self._cuts.get(n, none) for n in node.all_input_nodes))
            size = sum(map(chains.bytes_of, below))
            is_smaller = chains.is_cheap(node) and size <= chains.bytes_of(node)
            is_made = node in chains.again or is_smaller
            self._cuts[node] = below if is_made else frozenset([node])
        self._readers: dict[fx.Node, list[fx.Node]] = {}
        for node in chains.read:
            for saved in self._cuts[node]:
                self._readers.setdefault(saved, []).append(node)

    def products(self) -> Iterator[Chain]:
        """The chains of all saved tensors that are products, or made of some."""
        for node in sorted(self._readers, key=self._order.__getitem__):
            chain = self.product(node)
            if chain is not None:
                yield chain

    def product(self, made: fx.Node) -> Chain | None:
        """The chain of a saved tensor; None if it is no product, or not made of any."""
        behind = self._behind(made)
        products = [node for node in behind if node.target in _OPERANDS]
        if not products:
            return None
        sources = frozenset(n for node in behind for n in node.all_input_nodes) - behind
        if any(map(self._chains.is_packed, sources)):
            return None
        copies = (node for node in behind if node.target is _aten.cat.default)
        copied = Cost({"elementwise": 2 * sum(map(self._chains.bytes_of, copies))})
        cost = sum(map(self._cost, products), copied) + self._moved(made, products)
        nodes = sorted(behind | self._made_of(made), key=self._order.__getitem__)
        return Chain(made, tuple(nodes), sources, self._chains.bytes_of(made), cost)

    def take(self, chain: Chain) -> None:
        """Count a product as recomputed."""
        self._chains.again.update(chain.nodes)
        self._chains.fewer_bytes += chain.size
        for node in self._readers.pop(chain.made):
            self._cuts[node] -= {chain.made}

    def _behind(self, made: fx.Node) -> set[fx.Node]:
        """The nodes that compute a tensor from saved ones; none if that is not possible."""
        pending, behind = [made], set[fx.Node]()
        while pending:
            node = pending.pop()
            is_source = node is not made and node in self._readers
            if node in behind or node.op != "call_function" or is_source:
                continue
            if self._is_in_backward(node):
                continue
            is_again = node in self._chains.again or self._may_run(node)
            if not is_again or len(behind) >= _MOST_NODES:
                return set()
            behind.add(node)
            pending += node.all_input_nodes
        return behind

    def _may_run(self, node: fx.Node) -> bool:
        is_other = node.target in _OPERANDS or node.target is _aten.cat.default
        return self._chains.is_cheap(node) or (is_other and self._chains.may_run_again(node))

    def _is_in_backward(self, node: fx.Node) -> bool:
        """True if a plan has the backward compute a node, such as a merged weight."""
        is_tagged = node.meta.get("recompute") == CheckpointPolicy.MUST_RECOMPUTE
        return is_tagged and any(map(self._chains.runs_backward, readers_of(node)))

    def _made_of(self, made: fx.Node) -> set[fx.Node]:
        """What pointwise operators make of a saved tensor for the backward."""
        found, pending = set[fx.Node](), list(self._readers[made])
        while pending:
            node = pending.pop()
            if node is not made and node not in found and made in self._cuts.get(node, ()):
                found.add(node)
                pending += node.all_input_nodes
        return found

    def _cost(self, product: fx.Node) -> Cost:
        """The cost of a product, and of making those of its operands that are not there."""
        chains = self._chains
        first = _OPERANDS[product.target]
        left, right = product.all_input_nodes[first], product.all_input_nodes[-1]
        *batch, m, k = map(chains.hint, shape_of(left))
        n = chains.hint(shape_of(right)[-1])
        turned = _is_turned(left), _is_turned(right)
        val = example_of(product)
        assert val is not None
        cost = MatMul(batch[0] if batch else 1, m, k, n, val.itemsize, turned).cost
        for operand in map(_base_of, (left, right)):
            is_made = operand in chains.again or chains.is_cheap(operand)
            if is_made and operand not in self._readers and not chains.is_written(operand):
                moved = sum(map(chains.bytes_of, self._cuts.get(operand, ())))
                moved += chains.bytes_of(operand)
                cost += Cost({"elementwise": moved, "launches": 1})
        return cost

    def _moved(self, made: fx.Node, products: list[fx.Node]) -> Cost:
        """The cost of the pointwise operators between products and what the backward reads."""
        size = self._chains.bytes_of
        moved = 0 if made in products else size(made) + sum(map(size, products))
        launches = 0
        for node in self._readers[made]:
            is_view = _base_of(node) is made
            if not is_view and self._chains.is_written(node) and node not in self._chains.again:
                moved += size(made) + size(node)
                launches += 1
        return Cost({"elementwise": moved, "launches": launches})


def _base_of(node: fx.Node) -> fx.Node:
    """What a node is a view of; itself if it is none."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node


def _is_turned(node: fx.Node) -> bool:
    """True if a matrix lies transposed."""
    val = example_of(node)
    return val is not None and val.stride(-1) != 1 and val.stride(-2) == 1
